/** The two sides of a split queue against a model queue: any program of adds, publishes, pops and pushes, with wrap. */
import { fc, test } from '@fast-check/vitest';
import { FlatGuestMemory } from '@ebb/machine';
import { expect } from 'vitest';
import { needEvent } from '../uapi/index.ts';
import { ChainBatch } from '../device/index.ts';
import { RINGS, rig } from '../testing/index.ts';

type Step = { readonly kind: 'add' | 'publish' | 'pop' | 'push' | 'reap'; readonly n: number };

const step = fc.record({
  kind: fc.constantFrom('add', 'publish', 'pop', 'push', 'reap'),
  n: fc.integer({ min: 1, max: 5 }),
});

test.prop([fc.array(step as fc.Arbitrary<Step>, { maxLength: 300 }), fc.boolean(), fc.boolean()], {
  numRuns: 60,
})(
  'every buffer added is popped once in order, returned once, and its descriptors come back (I21)',
  (program, eventIdx, batch) => {
    const r = rig({ driverBits: eventIdx ? [29] : [] });
    const device = r.device.queue;
    if (device === null) throw new Error('active');
    // The model: what is where, by token.
    const added: number[] = [];
    const visible: number[] = [];
    const held: { token: number; chain: NonNullable<ReturnType<typeof device.pop>> }[] = [];
    const returned: number[] = [];
    const lengths = new Map<number, number>();
    let token = 0;
    for (let round = 0; round < 6; round++) {
      for (const { kind, n } of program) {
        if (kind === 'add') {
          const free = r.queue.free;
          const ok = r.queue.add(
            r.memory,
            Array.from({ length: n }, (_, i) => ({ gpa: 0x20000 + i * 64, length: 8 })),
            [],
            token,
          );
          expect(ok).toBe(free >= n);
          if (!ok) continue;
          lengths.set(token, n);
          added.push(token++);
        } else if (kind === 'publish') {
          r.queue.publish(r.memory);
          visible.push(...added.splice(0));
        } else if (kind === 'pop') {
          const chain = device.pop();
          expect(chain === null).toBe(visible.length === 0);
          if (chain === null) continue;
          const want = visible.shift() as number;
          expect(chain.readableSegments).toBe(lengths.get(want));
          held.push({ token: want, chain });
        } else if (kind === 'push' && held.length > 0) {
          const [one] = held.splice(n % held.length, 1);
          device.push(one.chain, 0);
          returned.push(one.token);
        } else if (kind === 'reap') {
          const got = batch && n > 3 ? -2 : r.queue.popUsed(r.memory);
          if (got === -2) continue;
          expect(got).toBe(returned.length === 0 ? -1 : returned.shift());
        }
      }
    }
    const outstanding = [...added, ...visible, ...held.map((h) => h.token), ...returned];
    const used = outstanding.reduce((sum, t) => sum + (lengths.get(t) ?? 0), 0);
    expect(r.queue.free).toBe(r.queue.size - used);
    expect(device.error).toBe(null);
    expect(r.queue.broken).toBe(false);
  },
);

/** Written differently on purpose: walk from old to new and see whether the event is passed. */
function passes(event: number, newIndex: number, oldIndex: number): boolean {
  for (let i = oldIndex; i !== newIndex; i = (i + 1) % 65536) if (i === event) return true;
  return false;
}

test.prop([
  fc.integer({ min: 0, max: 65535 }),
  fc.integer({ min: 0, max: 65535 }),
  fc.integer({ min: 0, max: 300 }),
])('needEvent agrees with walking the indices, across the wrap', (event, oldIndex, distance) => {
  const newIndex = (oldIndex + distance) & 0xffff;
  expect(needEvent(event, newIndex, oldIndex)).toBe(passes(event, newIndex, oldIndex));
  expect(needEvent(oldIndex, newIndex, oldIndex)).toBe(distance > 0);
});

test('the batch path agrees with the single path', () => {
  const r = rig();
  const device = r.device.queue;
  if (device === null) throw new Error('active');
  const gpas = Float64Array.from({ length: 16 }, (_, i) => 0x20000 + i * 256);
  const heads = new Int32Array(16);
  const tokens = Int32Array.from({ length: 16 }, (_, i) => 100 + i);
  const reaped = new Int32Array(16);
  const at = new Float64Array(16);
  const len = new Int32Array(16);
  for (let round = 0; round < 5000; round++) {
    expect(r.queue.addSingles(r.memory, gpas, tokens, 16, 256, true)).toBe(16);
    expect(device.popSingles(heads, at, len, 16)).toBe(16);
    expect([...at]).toEqual([...gpas]);
    expect(len[0]).toBe(-256);
    device.pushSingles(heads, 16, 256);
    expect(r.queue.popUsedBatch(r.memory, reaped, 16)).toBe(16);
    expect(reaped).toEqual(tokens);
  }
  expect(r.queue.free).toBe(r.queue.size);
});

test('buffers added in a batch are reaped one by one as well, through descriptors that were parts of longer chains', () => {
  const r = rig();
  const device = r.device.queue;
  if (device === null) throw new Error('active');
  const reapAll = (): number => {
    for (let chain = device.pop(); chain !== null; chain = device.pop()) device.push(chain, 0);
    let reaped = 0;
    while (r.queue.popUsed(r.memory) >= 0) reaped++;
    return reaped;
  };
  const segments = Array.from({ length: 3 }, (_, i) => ({ gpa: 0x20000 + i * 64, length: 8 }));
  while (r.queue.add(r.memory, segments, [], 1));
  r.queue.publish(r.memory);
  expect(reapAll()).toBe(Math.floor(r.queue.size / 3));
  const gpas = Float64Array.from({ length: r.queue.size }, (_, i) => 0x20000 + i * 256);
  const tokens = new Int32Array(r.queue.size);
  expect(r.queue.addSingles(r.memory, gpas, tokens, r.queue.size, 256, true)).toBe(r.queue.size);
  expect(reapAll()).toBe(r.queue.size);
  expect(r.queue.free).toBe(r.queue.size);
  // The free list holds each of them once.
  expect(r.queue.addSingles(r.memory, gpas, tokens, r.queue.size, 256, true)).toBe(r.queue.size);
  expect(reapAll()).toBe(r.queue.size);
  expect(r.queue.broken).toBe(false);
});

test('buffers through tables are popped, returned and reaped in batches, among others that are not', () => {
  const r = rig();
  const device = r.device.queue;
  if (device === null) throw new Error('active');
  const popped = new ChainBatch(8, r.queue.size);
  const tables = Float64Array.of(0x30000, 0x30040);
  for (const table of tables) {
    r.memory.i32.set([0x20000, 0, 16, 1 | (1 << 16)], table >> 2);
    r.memory.i32.set([0x21000, 0, 4096, 1 | 2 | (2 << 16)], (table >> 2) + 4);
    r.memory.i32.set([0x20100, 0, 1, 2], (table >> 2) + 8);
  }
  const long = Array.from({ length: 3 }, (_, i) => ({ gpa: 0x22000 + i * 4096, length: 4096 }));
  const reaped = new Int32Array(16);
  for (let round = 0; round < 1000; round++) {
    expect(r.queue.addTables(r.memory, tables, Int32Array.of(1, 2), 2, 3)).toBe(2);
    r.queue.add(r.memory, long.slice(0, 1), long.slice(1), 3);
    r.queue.publish(r.memory);
    expect(device.popChains(popped, 8)).toBe(3);
    expect([0, 1, 2].map((i) => [popped.start(i), popped.end(i)])).toEqual([
      [0, 3],
      [3, 6],
      [6, 9],
    ]);
    // What the device may write has a negative length.
    expect([3, 4, 5].map((j) => [popped.gpa(j), popped.length(j)])).toEqual([
      [0x20000, 16],
      [0x21000, -4096],
      [0x20100, -1],
    ]);
    device.pushChains(popped);
    const used = (r.memory.i32[(RINGS.device + 4) / 4 + 2 * ((3 * round) % r.queue.size) + 1] ?? 0) >>> 0;
    expect(used).toBe(4097);
    expect(r.queue.popUsedBatch(r.memory, reaped, 16)).toBe(3);
    expect([...reaped.subarray(0, 3)]).toEqual([1, 2, 3]);
  }
  expect([r.queue.free, r.queue.broken, device.inFlight]).toEqual([r.queue.size, false, 0]);
});

/** Guest memory whose upper half is another view, as a host's memory beyond its first GiB is. */
class TwoViews extends FlatGuestMemory {
  readonly #lower: FlatGuestMemory;
  readonly #upper: FlatGuestMemory;

  constructor(bytes: number) {
    super(new ArrayBuffer(bytes));
    this.#lower = new FlatGuestMemory(new ArrayBuffer(bytes / 2));
    this.#upper = new FlatGuestMemory(new ArrayBuffer(bytes / 2));
  }
  override window(gpa: number, length: number, write: boolean): boolean {
    if (!this.contains(gpa, length, write)) return false;
    const half = gpa < this.size / 2 ? this.#lower : this.#upper;
    ({ u8: this.u8, u16: this.u16, i32: this.i32 } = half);
    this.at = gpa % (this.size / 2);
    return true;
  }
}

test.prop([fc.array(fc.boolean(), { minLength: 4, maxLength: 4 })])(
  'rings, tables and buffers may each lie in another part of the host’s memory',
  (upper) => {
    const memory = new TwoViews(1 << 20);
    const [desc, driver, device, table] = upper.map((is, i) => 0x10000 + i * 0x1000 + (is ? 1 << 19 : 0));
    const r = rig({ memory, rings: { desc, driver, device } });
    const queue = r.device.queue;
    if (queue === null) throw new Error('active');
    expect(memory.window(table, 16, true)).toBe(true);
    memory.i32.set([0x20000, 0, 64, 2], memory.at >> 2);
    const popped = new ChainBatch(8, r.queue.size);
    const reaped = new Int32Array(8);
    for (const batch of [true, false]) {
      r.queue.addSingles(memory, Float64Array.of(0x20000, 0xa0000), Int32Array.of(1, 2), 2, 16, true);
      r.queue.addTables(memory, Float64Array.of(table), Int32Array.of(3), 1, 1);
      const seen: number[][] = [];
      if (batch) {
        for (let n = queue.popChains(popped, 8); n > 0; n = queue.popChains(popped, 8)) {
          for (let i = 0; i < n; i++)
            seen.push([popped.gpa(popped.start(i)), Math.abs(popped.length(popped.start(i)))]);
          queue.pushChains(popped);
        }
      }
      for (let chain = queue.pop(); chain !== null; chain = queue.pop()) {
        seen.push([chain.gpas[0], chain.lengths[0]]);
        queue.push(chain, 0);
      }
      expect(seen).toEqual([
        [0x20000, 16],
        [0xa0000, 16],
        [0x20000, 64],
      ]);
      expect([r.queue.popUsedBatch(memory, reaped, 8), ...reaped.subarray(0, 3)]).toEqual([3, 1, 2, 3]);
    }
    expect([queue.error, r.queue.broken]).toEqual([null, false]);
  },
);

test('a batch is returned once, and an empty one returns nothing', () => {
  const r = rig();
  const device = r.device.queue;
  if (device === null) throw new Error('active');
  const popped = new ChainBatch(8, r.queue.size);
  r.queue.addSingles(r.memory, Float64Array.of(0x20000, 0x20100), Int32Array.of(4, 5), 2, 16, true);
  expect(device.popChains(popped, 8)).toBe(2);
  device.pushChains(popped);
  device.pushChains(popped);
  expect(device.popChains(popped, 8)).toBe(0);
  device.pushChains(popped);
  const reaped = new Int32Array(8);
  expect([r.queue.popUsedBatch(r.memory, reaped, 8), device.inFlight]).toEqual([2, 0]);
  expect([r.queue.popUsedBatch(r.memory, reaped, 8), r.queue.broken]).toEqual([0, false]);
});

test('entries that the device knows of already are taken from no queue that is broken or was taken away', () => {
  for (const end of ['broken', 'stopped']) {
    const r = rig();
    const device = r.device.queue;
    if (device === null) throw new Error('active');
    const popped = new ChainBatch(2, r.queue.size);
    const at = Float64Array.of(0x20000, 0x20100, 0x20200, 0x20300);
    r.queue.addSingles(r.memory, at, Int32Array.of(1, 2, 3, 4), 4, 16, true);
    expect(device.popChains(popped, 2)).toBe(2);
    if (end === 'stopped') device.stop();
    else device.error = { kind: 'head-out-of-range', head: 999 };
    const words = new Int32Array(2);
    expect(device.popChains(popped, 2) + device.popSingles(words, new Float64Array(2), words, 2)).toBe(0);
  }
});

test('a batch that breaks the ring is reaped up to there', () => {
  const r = rig();
  r.queue.addSingles(
    r.memory,
    Float64Array.of(0x20000, 0x20100, 0x20200),
    Int32Array.of(4, 5, 6),
    3,
    16,
    true,
  );
  const used = (RINGS.device + 4) / 4;
  r.memory.i32.set([0, 16, 0, 16], used);
  r.memory.u16[(RINGS.device + 2) / 2] = 2;
  const reaped = new Int32Array(4);
  expect([r.queue.popUsedBatch(r.memory, reaped, 4), reaped[0], r.queue.broken]).toEqual([1, 4, true]);
  expect(r.queue.popUsedBatch(r.memory, reaped, 4)).toBe(0);
});

test('an id beyond the queue breaks it', () => {
  for (const batch of [false, true]) {
    const r = rig();
    r.queue.addSingles(r.memory, Float64Array.of(0x20000), Int32Array.of(4), 1, 16, true);
    r.memory.i32[(RINGS.device + 4) / 4] = r.queue.size;
    r.memory.u16[(RINGS.device + 2) / 2] = 1;
    const got = batch ? r.queue.popUsedBatch(r.memory, new Int32Array(4), 4) : r.queue.popUsed(r.memory);
    expect([got, r.queue.broken]).toEqual([batch ? 0 : -1, true]);
  }
});

test('a device whose index jumps breaks the queue for batches too', () => {
  const r = rig();
  r.memory.u16[(RINGS.device + 2) / 2] = r.queue.size + 1;
  expect([r.queue.popUsedBatch(r.memory, new Int32Array(4), 4), r.queue.broken]).toEqual([0, true]);
});

test('a device that returns a buffer twice breaks the queue', () => {
  const r = rig({});
  r.queue.add(r.memory, [{ gpa: 0x20000, length: 8 }], [], 7);
  r.queue.add(r.memory, [{ gpa: 0x20000, length: 8 }], [], 8);
  r.queue.publish(r.memory);
  const first = r.device.queue?.pop();
  if (first === null || first === undefined) throw new Error('available');
  r.device.queue?.push(first, 0);
  r.device.queue?.push(first, 0);
  expect(r.queue.popUsed(r.memory)).toBe(7);
  expect(r.queue.popUsed(r.memory)).toBe(-1);
  expect(r.queue.broken).toBe(true);
});

test('a descriptor in the middle of a chain is not returned as a buffer', () => {
  for (const batched of [true, false]) {
    const r = rig();
    const parts = [0x20000, 0x20100, 0x20200].map((gpa) => ({ gpa, length: 16 }));
    expect(r.queue.add(r.memory, parts.slice(0, 1), [], 4)).toBe(true);
    // Takes descriptors 1, 2 and 3.
    expect(r.queue.add(r.memory, parts, [], 5)).toBe(true);
    r.queue.publish(r.memory);
    r.memory.i32.set([2, 0], (RINGS.device + 4) / 4);
    r.memory.u16[(RINGS.device + 2) / 2] = 1;
    const got = batched ? r.queue.popUsedBatch(r.memory, new Int32Array(4), 4) : r.queue.popUsed(r.memory);
    expect([got, r.queue.broken]).toEqual([batched ? 0 : -1, true]);
  }
});
