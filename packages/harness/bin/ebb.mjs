#!/usr/bin/env node
import { launch } from './launch.mjs';

process.exit(await launch('cli', process.argv.slice(2)));
