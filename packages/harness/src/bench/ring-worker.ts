/** One side of a split ring in its own thread, over a plain shared buffer. Spins; measures nothing itself. */
import { FlatGuestMemory } from '@ebb/machine';
import { C_WRITTEN, CHAIN_WORDS, ChainBatch, SplitDeviceQueue } from '@ebb/virtio/device';
import { SplitDriverQueue, driverQueueWords } from '@ebb/virtio/driver';
import type { RingAddresses } from '@ebb/virtio/uapi';
import { exposeToParent } from '../run/worker-port.ts';

// Local copies: docs/performance.md § Constants.
const WORDS: number = CHAIN_WORDS;
const WRITTEN: number = C_WRITTEN;
const RINGS: RingAddresses = { desc: 0x1000, driver: 0x2000, device: 0x3000 };
const SIZE = 256;
/** Indirect tables of the chain benchmark: one per token, three descriptors each. */
const TABLES = 0x10000;

/** Single descriptors by the batch, chains of three by the batch, or such chains popped and returned one by one. */
export type RingMode = 'singles' | 'chains' | 'one by one';

export class RingWorker {
  /** The device: takes what is there, returns it, until `total` buffers have passed. */
  device(buffer: SharedArrayBuffer, total: number, batch: number, mode: RingMode): number {
    const memory = new FlatGuestMemory(buffer);
    const queue = new SplitDeviceQueue({
      size: SIZE,
      rings: RINGS,
      memory,
      eventIdx: false,
      indirect: mode !== 'singles',
    });
    if (mode === 'singles') return takeSingles(queue, total, batch);
    return mode === 'chains' ? takeChains(queue, total, batch) : takeOneByOne(queue, total);
  }

  /** The driver: adds batches, reaps when fewer than half the entries are free. Returns million buffers per second. */
  driver(buffer: SharedArrayBuffer, total: number, batch: number, mode: RingMode): number {
    const chains = mode !== 'singles';
    const memory = new FlatGuestMemory(buffer);
    const queue = new SplitDriverQueue({
      size: SIZE,
      rings: RINGS,
      state: new Int32Array(driverQueueWords(SIZE)),
      stateBase: 0,
      eventIdx: false,
      indirect: chains,
    });
    queue.reset(memory);
    const gpas = Float64Array.from({ length: batch }, (_, i) => 0x20000 + 256 * i);
    const tables = Float64Array.from({ length: batch }, (_, i) => TABLES + 48 * i);
    const names = Int32Array.from({ length: batch }, (_, i) => i);
    const tokens = new Int32Array(SIZE);
    if (chains) writeTables(memory);
    let added = 0;
    let reaped = 0;
    const began = performance.now();
    while (reaped < total) {
      if (added < total && queue.free >= batch) {
        const n = Math.min(batch, total - added);
        if (chains) queue.addTables(memory, tables, names, n, 3);
        else queue.addSingles(memory, gpas, names, n, 256, true);
        added += n;
      }
      if (queue.free < SIZE / 2 || added >= total) {
        const n = queue.popUsedBatch(memory, tokens, SIZE);
        if (n === 0) Atomics.pause();
        reaped += n;
      }
    }
    return total / (performance.now() - began) / 1000;
  }
}

// Each a function of its own, so that V8 compiles what runs and no more.

function takeSingles(queue: SplitDeviceQueue, total: number, batch: number): number {
  const heads = new Int32Array(batch);
  const gpas = new Float64Array(batch);
  const lengths = new Int32Array(batch);
  let bytes = 0;
  for (let done = 0; done < total; ) {
    const n = queue.popSingles(heads, gpas, lengths, batch);
    if (n === 0) {
      Atomics.pause();
      continue;
    }
    for (let i = 0; i < n; i++) bytes = (bytes - lengths[i]) | 0;
    queue.pushSingles(heads, n, 256);
    done += n;
  }
  return bytes;
}

function takeChains(queue: SplitDeviceQueue, total: number, batch: number): number {
  const popped = new ChainBatch(batch, SIZE);
  let bytes = 0;
  for (let done = 0; done < total; ) {
    const n = queue.popChains(popped, batch);
    if (n === 0) {
      Atomics.pause();
      continue;
    }
    bytes = (bytes + bytesOf(popped, n)) | 0;
    queue.pushChains(popped);
    done += n;
  }
  return bytes;
}

/** What the device does with a batch, apart from the loop so that V8 has registers left for that. */
function bytesOf(popped: ChainBatch, n: number): number {
  const { chains } = popped;
  let bytes = 0;
  // Touched before the loop: docs/performance.md § Loops.
  void chains[WRITTEN];
  for (let at = WRITTEN; at < n * WORDS; at = (at + WORDS) | 0) bytes = (bytes + chains[at]) | 0;
  return bytes;
}

function takeOneByOne(queue: SplitDeviceQueue, total: number): number {
  let bytes = 0;
  for (let done = 0; done < total; ) {
    const chain = queue.pop();
    if (chain === null) {
      Atomics.pause();
      continue;
    }
    bytes = (bytes + chain.totalBytes) | 0;
    queue.push(chain, chain.writableBytes);
    queue.recycle(chain);
    done++;
  }
  return bytes;
}

/** Three descriptors each: a header, data, a status byte. */
function writeTables(memory: FlatGuestMemory): void {
  for (let t = 0; t < 256; t++) {
    const at = (TABLES + 48 * t) / 4;
    [
      [0x20000, 16, 1 | (1 << 16)],
      [0x21000, 4096, 1 | (2 << 16)],
      [0x20100, 1, 2],
    ].forEach(([gpa, length, flags], i) => {
      memory.i32[at + i * 4] = gpa;
      memory.i32[at + i * 4 + 1] = 0;
      memory.i32[at + i * 4 + 2] = length;
      memory.i32[at + i * 4 + 3] = flags;
    });
  }
}

exposeToParent(new RingWorker());
