#!/usr/bin/env node
// Plain JavaScript on purpose: it must start on an older Node and hand over to the pinned one.
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('../../..', import.meta.url));
const source = fileURLToPath(new URL('../src/cli.ts', import.meta.url));
const built = fileURLToPath(new URL('../dist/cli.js', import.meta.url));
const pinned = `${root}node_modules/.bin/node${process.platform === 'win32' ? '.cmd' : ''}`;
const own = Number(process.versions.node.split('.')[0]) >= 26;
const runtime = own || !existsSync(pinned) ? process.execPath : pinned;
// From a checkout the sources run as they are; published packages run what was built.
const args = source.includes('node_modules') ? [built] : ['--conditions=ebb-source', source];
const { status, signal } = spawnSync(
  runtime,
  ['--disable-warning=ExperimentalWarning', ...args, ...process.argv.slice(2)],
  { stdio: 'inherit' },
);
process.exit(signal ? 3 : (status ?? 3));
