/**
 * One side of what V8 itself can do between two threads: a split ring and two words in turn, as plain loops over typed
 * arrays, without validation, tokens or objects. Tells how much of a distance from C is the language's.
 */
import { FlatGuestMemory } from '@ebb/machine';
import { exposeToParent } from '../run/worker-port.ts';

const SIZE = 256;
/** Descriptors as words; the available ring and its index as halves; the used ring as words, its index as a half. */
const DESC = 0x1000 >> 2;
const AVAIL_IDX = 0x2002 >> 1;
const AVAIL = 0x2004 >> 1;
const USED_IDX = 0x3002 >> 1;
const USED = 0x3004 >> 2;
/** The word of `ping` and `pong`. */
const BALL = 0;

export class BareWorker {
  /** Takes what is there and returns it, until `total` buffers have passed. */
  device(buffer: SharedArrayBuffer, total: number, batch: number): number {
    const { i32, u16 } = new FlatGuestMemory(buffer);
    let last = 0;
    let bytes = 0;
    for (let done = 0; done < total; ) {
      const n = Math.min((Atomics.load(u16, AVAIL_IDX) - last) & 0xffff, batch);
      if (n === 0) {
        Atomics.pause();
        continue;
      }
      for (let i = 0; i < n; i++) {
        const slot = (last + i) & (SIZE - 1);
        const head = u16[AVAIL + slot];
        bytes += i32[DESC + 4 * head + 2];
        i32[USED + 2 * slot] = head;
        i32[USED + 2 * slot + 1] = 256;
      }
      last = (last + n) & 0xffff;
      Atomics.store(u16, USED_IDX, last);
      done += n;
    }
    return bytes;
  }

  /** Adds batches, reaps when fewer than half the entries are free. Million buffers per second. */
  driver(buffer: SharedArrayBuffer, total: number, batch: number): number {
    const { i32, u16 } = new FlatGuestMemory(buffer);
    const next = Int32Array.from({ length: SIZE }, (_, i) => i + 1);
    let head = 0;
    let idx = 0;
    let last = 0;
    let free = SIZE;
    const began = performance.now();
    for (let added = 0, reaped = 0; reaped < total; ) {
      if (added < total && free >= batch) {
        for (let i = 0; i < batch; i++) {
          const at = DESC + 4 * head;
          i32[at] = 0x20000 + 256 * i;
          i32[at + 1] = 0;
          i32[at + 2] = 256;
          i32[at + 3] = 2;
          u16[AVAIL + ((idx + i) & (SIZE - 1))] = head;
          head = next[head];
        }
        idx = (idx + batch) & 0xffff;
        Atomics.store(u16, AVAIL_IDX, idx);
        free -= batch;
        added += batch;
      }
      if (free >= SIZE / 2 && added < total) continue;
      const n = (Atomics.load(u16, USED_IDX) - last) & 0xffff;
      if (n === 0) Atomics.pause();
      for (let i = 0; i < n; i++) {
        const id = i32[USED + 2 * ((last + i) & (SIZE - 1))];
        next[id] = head;
        head = id;
      }
      last = (last + n) & 0xffff;
      free += n;
      reaped += n;
    }
    return total / (performance.now() - began) / 1000;
  }

  /** Answers each change of the word. */
  pong(buffer: SharedArrayBuffer, count: number): void {
    const { i32 } = new FlatGuestMemory(buffer);
    for (let i = 0; i < count; i++) {
      while (Atomics.load(i32, BALL) !== 1) Atomics.pause();
      Atomics.store(i32, BALL, 0);
    }
  }

  /** Changes the word and waits for its answer: nanoseconds per round. */
  ping(buffer: SharedArrayBuffer, count: number): number {
    const { i32 } = new FlatGuestMemory(buffer);
    const began = performance.now();
    for (let i = 0; i < count; i++) {
      Atomics.store(i32, BALL, 1);
      while (Atomics.load(i32, BALL) !== 0) Atomics.pause();
    }
    return ((performance.now() - began) * 1e6) / count;
  }
}

exposeToParent(new BareWorker());
