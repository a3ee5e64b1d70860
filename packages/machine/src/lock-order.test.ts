import { expect, test, vi } from 'vitest';
import { LOCK_ORDER_BYTES, LockOrder } from './lock-order.ts';
import { trySpinLock } from './spin-lock.ts';

const words = new Int32Array(128);

test('two locks taken in both orders, by two threads that never met, are a cycle', () => {
  const buffer = new SharedArrayBuffer(LOCK_ORDER_BYTES);
  const a = new LockOrder(buffer);
  const b = new LockOrder(buffer);
  a.taken(words, 10, true);
  a.taken(words, 20, true);
  a.released(words, 20);
  a.released(words, 10);
  b.taken(words, 20, true);
  b.taken(words, 10, true);
  expect(a.cycles).toEqual([]);
  expect(b.cycles).toEqual([[10, 20]]);
});

test('a try-lock adds no edge to itself, and three locks can close a circle', () => {
  const buffer = new SharedArrayBuffer(LOCK_ORDER_BYTES);
  const order = new LockOrder(buffer);
  const both = (first: number, second: number, waits: boolean): void => {
    order.taken(words, first, true);
    order.taken(words, second, waits);
    order.released(words, second);
    order.released(words, first);
  };
  both(1, 2, true);
  both(2, 1, false);
  expect(order.cycles).toEqual([]);
  both(2, 3, true);
  both(3, 1, true);
  expect(order.cycles.length).toBe(1);
});

test('a lock is tried in one step: whoever takes it in between has it', () => {
  const words = new Int32Array(new SharedArrayBuffer(8));
  const { load } = Atomics;
  let other = false;
  vi.spyOn(Atomics, 'load').mockImplementation(((view: Int32Array, index: number) => {
    const value = load(view, index);
    // Another CPU, right after our look.
    if (value === 0) {
      view[index] = 8;
      other = true;
    }
    return value;
  }) as typeof Atomics.load);
  const got = trySpinLock(words, 1, 3);
  vi.restoreAllMocks();
  expect(got).toBe(!other);
  expect(words[1]).toBe(other ? 8 : 4);
  expect(trySpinLock(words, 1, 5)).toBe(false);
});
