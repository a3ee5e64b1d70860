// Plain JavaScript on purpose: it must start on an older Node and hand over to the pinned one.
import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { constants } from 'node:os';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('../../..', import.meta.url));
const pinned = `${root}node_modules/.bin/node${process.platform === 'win32' ? '.cmd' : ''}`;
const own = Number(process.versions.node.split('.')[0]) >= 26;
const runtime = own || !existsSync(pinned) ? process.execPath : pinned;
const fromSource = !root.includes('node_modules');

// Node strips types with a WebAssembly module whose memory grows, and a memory that grew makes V8 check at each access to
// a typed array that its buffer is still there, which costs 10 to 15 %. What was stripped once is kept and not stripped again.
if (fromSource) process.env['NODE_COMPILE_CACHE'] ??= `${root}node_modules/.cache/ebb`;

/**
 * Runs a module of this package, `name` relative to its sources, and resolves to its exit code: 128 and the signal's number
 * when we were told to stop it, 3 when something else killed it. It goes when we go: its channel to us closes.
 */
export function launch(name, args) {
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
    child.once('exit', (code, signal) =>
      resolve(signal === null ? (code ?? 3) : told === signal ? 128 + constants.signals[signal] : 3),
    );
  });
}
