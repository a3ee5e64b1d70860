/**
 * `Atomics` for controlled workers: each operation on shared memory is a schedule point, and waiting is modelled. It takes
 * the place of the global object in workers of controlled runs only, before anything else of theirs runs, so the code
 * under test is the code of every other run. A removed lock then still leaves the points of the accesses it guarded.
 */
import type { ControlledSchedule } from './controlled-schedule.ts';
import type { Point } from './schedule.ts';
import { regionOf, SHARED_REGIONS } from './shared-views.ts';

type Words = Int32Array<SharedArrayBuffer> | Uint16Array<SharedArrayBuffer>;

const real = Atomics;
const CONTROL = SHARED_REGIONS.indexOf('vcpu-control');
const LOG = SHARED_REGIONS.indexOf('violations');

/** Names the 32-bit word of an element in events: region code in the high byte, the word's number in the region below. */
export type WordNames = (view: Words, index: number) => number;

/** What else is to know of an operation: the race detector. Words are plain views here. */
export interface AtomicListener {
  /** The thread has read, or written, or both, element `index` of a plain view atomically; `id` names the word. */
  atomic(view: ArrayBufferView, index: number, id: number, reads: boolean, writes: boolean): void;
}

/**
 * Makes the object. `schedule` is this worker's end, null between executions, when operations are plain; `plain` turns an
 * observed view into the one beneath.
 */
export function observedAtomics(
  schedule: () => ControlledSchedule | null,
  name: WordNames,
  plain: <T extends ArrayBufferView>(view: T) => T,
  listener: AtomicListener,
): typeof Atomics {
  /** After a store that a protocol waits for: what follows must not be taken for part of it. */
  const settled = (words: Words, index: number): void => {
    const s = schedule();
    if (s !== null && regionOf(words.buffer) === CONTROL) s.point('stored', name(words, index));
  };
  const note = (words: Words, index: number, reads: boolean, writes: boolean): void => {
    if (schedule() !== null && words.buffer instanceof SharedArrayBuffer)
      listener.atomic(words, index, name(words, index), reads, writes);
  };
  const announce = (point: Point, words: Words, index: number): void => {
    const s = schedule();
    // What a checker writes down is no step of the protocol.
    if (s !== null && words.buffer instanceof SharedArrayBuffer && regionOf(words.buffer) !== LOG)
      s.point(point, name(words, index));
  };
  const rmw =
    (op: 'add' | 'sub' | 'and' | 'or' | 'xor' | 'exchange') =>
    (view: Words, index: number, value: number): number => {
      const words = plain(view);
      announce('rmw', words, index);
      note(words, index, true, true);
      const old = real[op](words as Int32Array, index, value);
      settled(words, index);
      return old;
    };
  const observed = {
    load(view: Words, index: number): number {
      const words = plain(view);
      announce('load', words, index);
      note(words, index, true, false);
      return real.load(words as Int32Array, index);
    },
    store(view: Words, index: number, value: number): number {
      const words = plain(view);
      announce('store', words, index);
      note(words, index, false, true);
      real.store(words as Int32Array, index, value);
      settled(words, index);
      return value;
    },
    compareExchange(view: Words, index: number, expected: number, value: number): number {
      const words = plain(view);
      // A failing exchange changes nothing that others wait for.
      announce(words[index] === expected ? 'rmw' : 'load', words, index);
      note(words, index, true, words[index] === expected);
      return real.compareExchange(words as Int32Array, index, expected, value);
    },
    add: rmw('add'),
    sub: rmw('sub'),
    and: rmw('and'),
    or: rmw('or'),
    xor: rmw('xor'),
    exchange: rmw('exchange'),
    wait(
      view: Int32Array<SharedArrayBuffer>,
      index: number,
      value: number,
      timeout?: number,
    ): 'ok' | 'not-equal' | 'timed-out' {
      const words = plain(view);
      const s = schedule();
      if (s === null) return real.wait(words, index, value, timeout);
      s.point('wait', name(words, index));
      if (words[index] !== value) return 'not-equal';
      // No time-out: a wake-up that only a time-out replaces is a lost one.
      s.sleep(name(words, index));
      return 'ok';
    },
    notify(view: Int32Array<SharedArrayBuffer>, index: number, count?: number): number {
      const words = plain(view);
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
