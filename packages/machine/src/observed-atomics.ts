/**
 * `Atomics` for controlled workers: each operation on shared memory is a schedule point, and waiting is modelled. It takes
 * the place of the global object in workers of controlled runs only, before anything else of theirs runs, so the code
 * under test is the code of every other run. A removed lock then still leaves the points of the accesses it guarded.
 */
import type { ControlledSchedule } from './controlled-schedule.ts';
import type { Point } from './schedule.ts';

type Words = Int32Array<SharedArrayBuffer> | Uint16Array<SharedArrayBuffer>;

const real = Atomics;

/** Names a word in events: region code in the high byte, index below. */
export type WordNames = (words: ArrayBufferView, index: number) => number;

/** Makes the object. `schedule` is this worker's end; null between executions, when operations are plain. */
export function observedAtomics(schedule: () => ControlledSchedule | null, name: WordNames): typeof Atomics {
  const announce = (point: Point, words: ArrayBufferView, index: number): void => {
    const s = schedule();
    if (s !== null && words.buffer instanceof SharedArrayBuffer) s.point(point, name(words, index));
  };
  const rmw =
    (op: 'add' | 'sub' | 'and' | 'or' | 'xor' | 'exchange') =>
    (words: Words, index: number, value: number): number => {
      announce('rmw', words, index);
      return real[op](words as Int32Array, index, value);
    };
  const observed = {
    load(words: Words, index: number): number {
      announce('load', words, index);
      return real.load(words as Int32Array, index);
    },
    store(words: Words, index: number, value: number): number {
      announce('store', words, index);
      return real.store(words as Int32Array, index, value);
    },
    compareExchange(words: Words, index: number, expected: number, value: number): number {
      // A failing exchange changes nothing that others wait for.
      announce(words[index] === expected ? 'rmw' : 'load', words, index);
      return real.compareExchange(words as Int32Array, index, expected, value);
    },
    add: rmw('add'),
    sub: rmw('sub'),
    and: rmw('and'),
    or: rmw('or'),
    xor: rmw('xor'),
    exchange: rmw('exchange'),
    wait(words: Int32Array, index: number, value: number, timeout?: number): 'ok' | 'not-equal' | 'timed-out' {
      const s = schedule();
      if (s === null) return real.wait(words, index, value, timeout);
      s.point('wait', name(words, index));
      if (words[index] !== value) return 'not-equal';
      // No time-out: a wake-up that only a time-out replaces is a lost one.
      s.sleep(name(words, index));
      return 'ok';
    },
    notify(words: Int32Array, index: number, count?: number): number {
      const s = schedule();
      return s === null ? real.notify(words, index, count) : s.wake(name(words, index));
    },
    pause(): void {
      schedule()?.spin('spin', 0);
    },
    isLockFree: (bytes: number): boolean => real.isLockFree(bytes),
    waitAsync: real.waitAsync,
    [Symbol.toStringTag]: 'Atomics' as const,
  };
  return observed as unknown as typeof Atomics;
}
