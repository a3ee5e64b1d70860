/** Scratch copies of the sources, in which faults are planted and checks run. */
import { createHash } from 'node:crypto';
import { spawn } from 'node:child_process';
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import { onCore } from '../fuzz/cores.ts';
import { UserError } from '../trace/trace.ts';

/** Top of the repository that this file belongs to. */
export const ROOT: string = fileURLToPath(new URL('../../../../', import.meta.url));
const COPIED = ['package.json', 'tsconfig.base.json', 'vitest.config.ts', 'vitest.shared.ts', 'packages'];

/** Every source file that a check may depend on, from the top of the repository. */
function sourceFiles(): string[] {
  const out: string[] = [];
  const walk = (folder: string): void => {
    for (const entry of readdirSync(folder, { withFileTypes: true })) {
      if (['node_modules', 'dist', 'out', '.nx'].includes(entry.name)) continue;
      const path = join(folder, entry.name);
      if (entry.isDirectory()) walk(path);
      else if (/\.(ts|json|ebbtrace)$/.test(entry.name)) out.push(relative(ROOT, path));
    }
  };
  walk(join(ROOT, 'packages'));
  return out.toSorted();
}

/** What was published has no sources to plant faults in. */
function mustBeCheckout(): void {
  if (!existsSync(join(ROOT, 'packages/harness/src')) || !existsSync(join(ROOT, 'node_modules')))
    throw new UserError('mutants: needs a checkout of the sources with its dependencies installed');
}

/** Hash of all sources: results are cached under it. */
export function sourcesHash(): string {
  mustBeCheckout();
  const hash = createHash('sha256');
  for (const file of sourceFiles()) hash.update(file).update(readFileSync(join(ROOT, file)));
  return hash.digest('hex');
}

export class Scratch {
  readonly folder: string;
  readonly #core: number | undefined;
  /** Process group of what runs in the copy. */
  #group: number | undefined;

  /** `core`: where searches in this copy run, if the platform can pin. */
  constructor(core?: number) {
    this.#core = core;
    mustBeCheckout();
    this.folder = mkdtempSync(join(tmpdir(), 'ebb-mutants-'));
    for (const name of COPIED)
      cpSync(join(ROOT, name), join(this.folder, name), {
        recursive: true,
        filter: (from) => !/\/(node_modules|dist|out|\.nx)(\/|$)/.test(relative(ROOT, from).padStart(1, '/')),
      });
    // Everything installed, but our own packages: those are the copies.
    const modules = join(this.folder, 'node_modules');
    mkdirSync(join(modules, '@ebb'), { recursive: true });
    for (const entry of readdirSync(join(ROOT, 'node_modules')))
      if (entry !== '@ebb') symlinkSync(join(ROOT, 'node_modules', entry), join(modules, entry));
    for (const name of readdirSync(join(this.folder, 'packages')))
      symlinkSync(join(this.folder, 'packages', name), join(modules, '@ebb', name));
  }

  read(file: string): string {
    return readFileSync(join(this.folder, file), 'utf8');
  }
  write(file: string, text: string): void {
    writeFileSync(join(this.folder, file), text);
  }
  /** Whether it is a file of the copy: a patch may name anything. */
  exists(file: string): boolean {
    const inside = !relative(this.folder, join(this.folder, file)).startsWith('..');
    return inside && statSync(join(this.folder, file), { throwIfNoEntry: false })?.isFile() === true;
  }

  /** Runs node in the copy; output, exit code, and whether it had to be stopped after `milliseconds`. */
  run(args: readonly string[], milliseconds: number): Promise<ScratchRun> {
    return this.#spawn([process.execPath, ...args], milliseconds);
  }

  /** As `run`, all threads on this copy's core: a search hands turns over, and another copy's must not be in its way. */
  search(args: readonly string[], milliseconds: number): Promise<ScratchRun> {
    return this.#spawn([...onCore(this.#core), process.execPath, ...args], milliseconds);
  }

  #spawn([command, ...args]: readonly string[], milliseconds: number): Promise<ScratchRun> {
    return new Promise((resolve) => {
      const child = spawn(command, args, {
        cwd: this.folder,
        stdio: ['ignore', 'pipe', 'pipe'],
        detached: true,
      });
      this.#group = child.pid;
      let output = '';
      let stopped = false;
      const keep = (text: Buffer): void => {
        output += text.toString();
      };
      child.stdout.on('data', keep);
      child.stderr.on('data', keep);
      const timer = setTimeout(() => {
        stopped = true;
        this.#stop();
      }, milliseconds);
      child.on('close', (code) => {
        clearTimeout(timer);
        this.#group = undefined;
        resolve({ code: code ?? -1, output, stopped });
      });
    });
  }

  /** Stops what runs: the whole group, campaigns and test workers too. */
  #stop(): void {
    if (this.#group !== undefined) process.kill(-this.#group, 'SIGKILL');
    this.#group = undefined;
  }

  /** Stops what runs and removes the copy. */
  remove(): void {
    this.#stop();
    // What was stopped may still be about to end.
    rmSync(this.folder, { recursive: true, force: true, maxRetries: 5, retryDelay: 100 });
  }
}

export interface ScratchRun {
  readonly code: number;
  readonly output: string;
  readonly stopped: boolean;
}
