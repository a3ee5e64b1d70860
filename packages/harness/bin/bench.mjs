// `npm run bench`. The first start only loads what is measured, so that it is measured without the cost of loading it.
import { launch } from './launch.mjs';

await launch('bench/main', ['--load']);
process.exit(await launch('bench/main', process.argv.slice(2)));
