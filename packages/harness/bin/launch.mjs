// Plain JavaScript on purpose: it must start on an older Node and hand over to the pinned one.
import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { constants } from 'node:os';
import { fileURLToPath } from 'node:url';

// The checkout's top, or the `node_modules` that this package is installed in.
const root = fileURLToPath(new URL('../../..', import.meta.url));
const fromSource = !root.includes('node_modules');
const pinned = `${root}${fromSource ? 'node_modules/' : ''}.bin/node${process.platform === 'win32' ? '.cmd' : ''}`;
const own = Number(process.versions.node.split('.')[0]) >= 26;
const runtime = own || !existsSync(pinned) ? process.execPath : pinned;

/** What is amiss with this Node, in one line; null: nothing. */
function unfit() {
  if (own || existsSync(pinned)) return null;
  return `needs Node 26, which npm installs as an optional dependency and has not; install again without --omit=optional, or start this with Node 26 (this is ${process.version})`;
}

// Node strips types with a WebAssembly module whose memory grows, and a memory that grew makes V8 check at each access to
// a typed array that its buffer is still there, which costs 10 to 15 %. What was stripped once is kept and not stripped again.
if (fromSource) process.env['NODE_COMPILE_CACHE'] ??= `${root}node_modules/.cache/ebb`;

/**
 * Runs a module of this package, `name` relative to its sources, and resolves to its exit code: 128 and the signal's number
 * when we were told to stop it, 3 when something else killed it. It goes when we go: its channel to us closes.
 */
export function launch(name, args) {
  const mistake = unfit();
  if (mistake !== null) {
    process.stderr.write(`ebb: ${mistake}\n`);
    return Promise.resolve(2);
  }
  // From a checkout the sources run as they are; published packages run what was built.
  const source = fileURLToPath(new URL(`../src/${name}.ts`, import.meta.url));
  const built = fileURLToPath(new URL(`../dist/${name}.js`, import.meta.url));
  const module = fromSource ? ['--conditions=ebb-source', source] : [built];
  const child = spawn(runtime, ['--disable-warning=ExperimentalWarning', ...module, ...args], {
    stdio: ['inherit', 'inherit', 'inherit', 'ipc'],
  });
  let told = null;
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'])
    process.on(signal, () => {
      told = signal;
      child.kill(signal);
    });
  return new Promise((resolve) => {
    child.once('error', (error) => {
      process.stderr.write(`ebb: ${runtime}: ${error.message}\n`);
      resolve(3);
    });
    child.once('exit', (code, signal) => {
      if (signal === null) resolve(code ?? 3);
      else if (told === signal) resolve(128 + constants.signals[signal]);
      else {
        process.stderr.write(`ebb: its process was ended by ${signal}\n`);
        resolve(3);
      }
    });
  });
}
