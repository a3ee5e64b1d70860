/**
 * A test-and-set spin lock in one shared Int32 word: 0 free, otherwise the holder's id + 1. Models the kernel's
 * `spinlock_t` without queueing. Ordinary kernel paths run to completion, so a holder is never descheduled by us.
 *
 * A guest that spins must keep answering flush requests, or a holder that exits to a host waiting for this vCPU's
 * acknowledgement deadlocks with it: `relax` is called between polls and begins a guest section.
 */
import { assert } from './assert.ts';
import type { LockObserver } from './lock-order.ts';

const POLLS_BETWEEN_RELAX = 64;

/** Set in workers of controlled runs; null everywhere else. */
let observer: LockObserver | null = null;

/** Lets `next` hear of every lock this worker takes and releases; null: nobody. */
export function observeLocks(next: LockObserver | null): void {
  observer = next;
}

/**
 * Takes the lock at `words[index]` for `holder` (≥ 0). Pairs with the `Atomics.store` in `spinUnlock`.
 * `relax` runs while waiting; it must begin a section (vCPUs) or pump tasks (inline).
 */
export function spinLock(words: Int32Array, index: number, holder: number, relax: () => void): void {
  if (Atomics.compareExchange(words, index, 0, holder + 1) === 0) {
    if (observer !== null) observer.taken(words, index, true);
    return;
  }
  assert(words[index] !== holder + 1, `lock ${index} taken twice by ${holder}`);
  for (;;) {
    for (let i = 0; i < POLLS_BETWEEN_RELAX; i++) {
      if (Atomics.load(words, index) === 0 && Atomics.compareExchange(words, index, 0, holder + 1) === 0) {
        if (observer !== null) observer.taken(words, index, true);
        return;
      }
    }
    relax();
  }
}

/** Takes the lock if it is free; false otherwise. */
export function trySpinLock(words: Int32Array, index: number, holder: number): boolean {
  if (Atomics.compareExchange(words, index, 0, holder + 1) !== 0) return false;
  if (observer !== null) observer.taken(words, index, false);
  return true;
}

/** Releases the lock. Pairs with the compare-exchange in `spinLock`, which acquires what the holder wrote. */
export function spinUnlock(words: Int32Array, index: number): void {
  if (observer !== null) observer.released(words, index);
  Atomics.store(words, index, 0);
}
