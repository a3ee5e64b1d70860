/** What every command of `ebb` does with its output: lines, progress, files, JSON. */
import { accessSync, constants, existsSync, mkdirSync, statSync, writeFileSync } from 'node:fs';
import { dirname } from 'node:path';
import { REPLAY_BEGINS, REPLAY_ENDS } from './run/trace-writer.ts';
import { UserError } from './trace/trace.ts';

/** With `--json -` standard output is exactly one JSON document; everything else goes to standard error. */
let toStderr = false;
/** Called by each command with its `--json` argument before it says anything. */
export function jsonToStdout(target: string | undefined): void {
  toStderr = target === '-';
}

/** A line for the user. */
export function say(text: string): void {
  (toStderr ? process.stderr : process.stdout).write(`${text}\n`);
}

/** One progress line, rewritten in place on a terminal, every few seconds elsewhere. */
export function progressLine(): { show(text: string): void; end(): void } {
  const { isTTY } = process.stderr;
  let last = 0;
  return {
    show(text) {
      const now = performance.now();
      if (now - last < (isTTY ? 100 : 5000)) return;
      last = now;
      process.stderr.write(isTTY ? `\r\u001b[K${text}` : `${text}\n`);
    },
    end() {
      if (isTTY) process.stderr.write('\r\u001b[K');
    },
  };
}

/** Says before the work what could not be written after it: a folder in a file's place, or none to put it in. */
export function checkOutputs(...paths: readonly (string | undefined)[]): void {
  for (const path of paths) {
    if (path === undefined || path === '-') continue;
    try {
      if (
        path === '' ||
        path.endsWith('/') ||
        statSync(path, { throwIfNoEntry: false })?.isDirectory() === true
      )
        throw new Error('is a folder, not a file');
      makeFolder(dirname(path));
      accessSync(dirname(path), constants.W_OK);
    } catch (error) {
      throw new UserError(`'${path}': cannot be written: ${(error as Error).message.split('\n')[0]}`);
    }
  }
}

/** As `mkdir -p`. One at a time: Node's own does not return where a file system refuses folders (`/proc`). */
function makeFolder(path: string): void {
  if (existsSync(path)) return;
  makeFolder(dirname(path));
  mkdirSync(path);
}

/** Writes a file, making its folders; what cannot be written is the user's one line. */
export function writeOut(path: string, text: string): void {
  try {
    makeFolder(dirname(path));
    writeFileSync(path, text);
  } catch (error) {
    throw new UserError(`${path}: cannot be written: ${(error as Error).message.split('\n')[0]}`);
  }
}

/** Writes a result to a file or, for `-`, to standard output. */
export function emitJson(target: string | undefined, value: unknown): void {
  if (target === undefined) return;
  const text = `${JSON.stringify(value, null, 2)}\n`;
  if (target === '-') process.stdout.write(text);
  else writeOut(target, text);
}

/**
 * Writes the allocation events of a run as tracefs text and its device events as QEMU trace lines; of several VMs each into
 * files of its own, as captures are.
 */
export function writeTraces(prefix: string, alloc: readonly string[], device: readonly string[]): void {
  const vm = (line: string): number => Number(/^ *(?:ebb-vm)?(\d+)/.exec(line)?.[1] ?? 0);
  const vms = new Set([...alloc, ...device].map(vm));
  if (vms.size < 2) writeVmTraces(prefix, alloc, device);
  else
    for (const k of [...vms].toSorted((a, b) => a - b))
      writeVmTraces(
        `${prefix}.vm${k}`,
        alloc.filter((line) => vm(line) === k),
        device.filter((line) => vm(line) === k),
      );
}

function writeVmTraces(prefix: string, alloc: readonly string[], device: readonly string[]): void {
  // Each vCPU's lines are in order; of several vCPUs they come a slice at a time.
  const at = (line: string): number => Number(/ (\d+\.\d+): /.exec(line)?.[1] ?? 0);
  const timed = alloc.map((line) => ({ line, at: at(line) }));
  const lines = timed.toSorted((a, b) => a.at - b.at).map(({ line }) => line);
  const begins = lines.find((line) => line.endsWith(`: ${REPLAY_BEGINS}`));
  if (begins !== undefined) {
    const time = /\d+\.\d+(?=: )/;
    lines.push(
      begins.replace(REPLAY_BEGINS, REPLAY_ENDS).replace(time, time.exec(lines.at(-1) ?? '')?.[0] ?? '0.0'),
    );
  }
  writeOut(`${prefix}.trace.txt`, `# tracer: nop\n#\n${lines.join('\n')}\n`);
  writeOut(`${prefix}.qemu-trace.log`, `${device.join('\n')}\n`);
  say(
    `traces: ${prefix}.trace.txt (${alloc.length} events), ${prefix}.qemu-trace.log (${device.length} events)`,
  );
}
