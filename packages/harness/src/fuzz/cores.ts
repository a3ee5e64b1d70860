/** Cores to pin a search to: its threads take turns, and a turn handed over on one core is an order of magnitude cheaper. */
import { spawnSync } from 'node:child_process';

/** Numbers of the cores that this process may run on; empty where the platform cannot pin. */
export function allowedCores(): number[] {
  const { status, stdout } = spawnSync('taskset', ['-pc', String(process.pid)], { encoding: 'utf8' });
  return status === 0 ? coresOf(stdout.slice(stdout.lastIndexOf(':') + 1)) : [];
}

/** `0-2,5` → 0, 1, 2, 5. */
export function coresOf(list: string): number[] {
  return list
    .trim()
    .split(',')
    .flatMap((part) => {
      const [first, last = first] = part.split('-').map(Number);
      return Array.from({ length: last - first + 1 }, (_, i) => first + i);
    });
}

/** What to put before a command so that it runs on `core`; nothing without one. */
export function onCore(core: number | undefined): readonly string[] {
  return core === undefined ? [] : ['taskset', '-c', String(core)];
}
