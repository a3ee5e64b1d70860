/** The two readers of descriptors against each other: the loop over words, and the one that says what is wrong. */
import { fc, test } from '@fast-check/vitest';
import { FlatGuestMemory, GiB, PAGE_SIZE, type DeviceMemory } from '@ebb/machine';
import { expect } from 'vitest';
import { VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE } from '../uapi/index.ts';
import { ChainBatch } from './chain-batch.ts';
import { ChainReader } from './chain-reader.ts';
import { DescriptorChain } from './descriptor-chain.ts';
import { SplitDeviceQueue } from './split-device-queue.ts';

const SIZE = 16;
/** Descriptors in a table: more than a chain may have. */
const TABLE = 20;
const RINGS = { desc: 0x1000, driver: 0x2000, device: 0x3000 };
const BYTES = 0x10000;

interface Written {
  readonly gpa: number;
  readonly high: number;
  readonly length: number;
  readonly flags: number;
  readonly next: number;
}
/** Mostly well-formed, with each mistake now and then. `next` of −1 is the one behind. */
const segment: fc.Arbitrary<Written> = fc.record({
  gpa: fc.oneof(
    { weight: 15, arbitrary: fc.integer({ min: 0x8000, max: 0xefff }) },
    { weight: 1, arbitrary: fc.constantFrom(-4096, 0x7fff_f000, BYTES, 0xfffc) },
  ),
  high: fc.oneof({ weight: 30, arbitrary: fc.constant(0) }, { weight: 1, arbitrary: fc.constant(1) }),
  length: fc.oneof(
    { weight: 15, arbitrary: fc.integer({ min: 1, max: 4096 }) },
    { weight: 1, arbitrary: fc.constantFrom(0, -1, 0x7fff_ffff, 0x8000) },
  ),
  flags: fc.oneof(
    { weight: 20, arbitrary: fc.constantFrom(0, VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE, 3) },
    { weight: 4, arbitrary: fc.constant(VIRTQ_DESC_F_NEXT) },
    { weight: 1, arbitrary: fc.integer({ min: 0, max: 7 }) },
  ),
  next: fc.oneof(
    { weight: 9, arbitrary: fc.constant(-1) },
    { weight: 2, arbitrary: fc.nat(TABLE - 1) },
    { weight: 1, arbitrary: fc.nat(0xffff) },
  ),
});
/** Tables lie at 0x4000 and, across a page, at 0x5f80. */
const table: fc.Arbitrary<Written> = fc.record({
  gpa: fc.oneof(
    { weight: 8, arbitrary: fc.constant(0x4000) },
    { weight: 2, arbitrary: fc.constantFrom(0x4010, 0x4008, 0x5f80, BYTES) },
  ),
  high: fc.oneof({ weight: 12, arbitrary: fc.constant(0) }, { weight: 1, arbitrary: fc.constant(1) }),
  length: fc.oneof(
    { weight: 8, arbitrary: fc.integer({ min: 1, max: TABLE }).map((n) => 16 * n) },
    { weight: 1, arbitrary: fc.constantFrom(0, 24, -16) },
  ),
  flags: fc.oneof(
    { weight: 10, arbitrary: fc.constant(VIRTQ_DESC_F_INDIRECT) },
    { weight: 1, arbitrary: fc.constant(VIRTQ_DESC_F_INDIRECT | VIRTQ_DESC_F_NEXT) },
  ),
  next: fc.constant(0),
});
const chained: fc.Arbitrary<Written> = segment.map((d) => ({
  ...d,
  flags: VIRTQ_DESC_F_NEXT,
  high: 0,
  length: 16,
  next: -1,
}));

/** Address and length of each segment; negative if the device may write it, as in a batch. */
function segmentsOf(chain: DescriptorChain): number[][] {
  return Array.from({ length: chain.segments }, (_, j) => [
    chain.gpas[j],
    j < chain.readableSegments ? chain.lengths[j] : -chain.lengths[j],
  ]);
}

function write(memory: FlatGuestMemory, at: number, index: number, d: Written): void {
  const next = d.next < 0 ? index + 1 : d.next;
  memory.i32.set([d.gpa, d.high, d.length, d.flags | (next << 16)], (at >> 2) + 4 * index);
}

test.prop(
  [
    fc.array(fc.oneof(segment, table), { minLength: SIZE, maxLength: SIZE }),
    // Long ones are few among arbitrary ones.
    fc.oneof(
      fc.array(segment, { minLength: TABLE, maxLength: TABLE }),
      fc
        .tuple(fc.array(chained, { minLength: TABLE - 1, maxLength: TABLE - 1 }), segment)
        .map(([a, b]) => [...a, b]),
    ),
    fc.array(fc.nat(SIZE), { minLength: 4, maxLength: 4 }),
    fc.boolean(),
  ],
  { numRuns: 3000 },
)('what the loop over words takes, the other reader takes alike', (ring, tables, heads, indirect) => {
  const memory = new FlatGuestMemory(new ArrayBuffer(BYTES));
  ring.forEach((d, i) => write(memory, RINGS.desc, i, d));
  for (const at of [0x4000, 0x5f80]) tables.forEach((d, i) => write(memory, at, i, d));
  heads.forEach((head, i) => (memory.u16[((RINGS.driver + 4) >> 1) + i] = head));
  const reader = new ChainReader(SIZE, RINGS, memory, indirect);
  const batch = new ChainBatch(4, SIZE * 4);
  const taken = reader.readCommon(batch, 0, 4);
  for (let i = 0; i <= taken && i < 4; i++) {
    const chain = new DescriptorChain(memory, () => undefined);
    const head = heads[i];
    const bad = head >= SIZE ? 'head' : reader.read(chain, head);
    const segments = segmentsOf(chain);
    if (i < taken) {
      const [start, end] = [batch.start(i), batch.end(i)];
      expect(bad).toBe(null);
      expect(
        Array.from({ length: end - start }, (_, j) => [batch.gpa(start + j), batch.length(start + j)]),
      ).toEqual(segments);
      expect([batch.head(i), batch.written(i)]).toEqual([head, chain.writableBytes]);
    } else {
      // It stopped for a reason: something is wrong, or a table lies uncommonly or comes after other descriptors.
      const d = ring[head % SIZE];
      const table = (d.flags & VIRTQ_DESC_F_INDIRECT) !== 0;
      const uncommon = table ? d.gpa % 16 !== 0 || (d.gpa & 4095) + d.length > 4096 : endsInTable(ring, head);
      expect(bad !== null || uncommon).toBe(true);
    }
  }
});

/** Somebody else's RAM, of which one window at a time is here: each call ends the window before. */
class OneWindow implements DeviceMemory {
  readonly u8: Uint8Array = new Uint8Array(PAGE_SIZE);
  readonly u16: Uint16Array = new Uint16Array(this.u8.buffer);
  readonly i32: Int32Array = new Int32Array(this.u8.buffer);
  at = 0;
  section = 0;
  from = 0;
  to = 0;
  readonly #whole: FlatGuestMemory;
  constructor(whole: FlatGuestMemory) {
    this.#whole = whole;
  }
  contains(gpa: number, length: number, write: boolean): boolean {
    return this.#whole.contains(gpa, length, write);
  }
  extent(gpa: number): boolean {
    this.to = this.#whole.size;
    return this.#whole.extent(gpa);
  }
  window(gpa: number, length: number, write: boolean): boolean {
    if (!this.contains(gpa, length, write)) return false;
    this.section++;
    this.at = gpa % PAGE_SIZE;
    this.u8.set(this.#whole.u8.subarray(gpa, gpa + length), this.at);
    return true;
  }
}

/** Memory that is elsewhere after the first touch of a page: what was found before shows rubbish. */
class Moving extends FlatGuestMemory {
  readonly #touched = new Set<number>();
  override window(gpa: number, length: number, write: boolean): boolean {
    if (!super.window(gpa, length, write)) return false;
    const page = Math.floor(gpa / PAGE_SIZE);
    if (this.#touched.has(page)) return true;
    this.#touched.add(page);
    this.section++;
    const old = this.u8;
    const buffer = new ArrayBuffer(old.length);
    this.u8 = new Uint8Array(buffer);
    this.u16 = new Uint16Array(buffer);
    this.i32 = new Int32Array(buffer);
    this.u8.set(old);
    // Descriptors of one byte each.
    new Int32Array(old.buffer).forEach((_, i, words) => (words[i] = i % 4 === 2 ? 1 : 0));
    return true;
  }
}

/** Memory of which some pages are read-only, or not there. */
class Patchwork extends FlatGuestMemory {
  /** Pages that somebody had a window of. */
  readonly touched = new Set<number>();
  readonly #pages: readonly Page[];
  readonly #extents: boolean;
  /** `extents` false: it knows of single pages only. */
  constructor(buffer: ArrayBuffer, pages: readonly Page[], extents: boolean) {
    super(buffer);
    this.#pages = pages;
    this.#extents = extents;
  }
  override contains(gpa: number, length: number, write: boolean): boolean {
    const page = this.#pages[Math.floor(gpa / PAGE_SIZE)];
    return (gpa % PAGE_SIZE) + length <= PAGE_SIZE && (page === 'ram' || (page === 'rom' && !write));
  }
  override window(gpa: number, length: number, write: boolean): boolean {
    if (!super.window(gpa, length, write)) return false;
    this.touched.add(Math.floor(gpa / PAGE_SIZE));
    return true;
  }
  override extent(gpa: number): boolean {
    const page = Math.floor(gpa / PAGE_SIZE);
    if (!this.#extents || this.#pages[page] !== 'ram') return false;
    const end = this.#pages.findIndex((kind, i) => i > page && kind !== 'ram');
    this.from = (this.#pages.findLastIndex((kind, i) => i < page && kind !== 'ram') + 1) * PAGE_SIZE;
    this.to = end < 0 ? BYTES : end * PAGE_SIZE;
    return true;
  }
}
type Page = 'ram' | 'rom' | 'hole';
/** Rings and tables lie in RAM; what segments name is mostly that. */
const pages: fc.Arbitrary<Page[]> = fc
  .array(fc.constantFrom<Page>('ram', 'ram', 'ram', 'rom', 'hole'), { minLength: 8, maxLength: 8 })
  .map((kinds) => [...Array.from({ length: 8 }, (): Page => 'ram'), ...kinds]);

/** Ring and tables as a driver may have written them, and the heads that are available. */
const rings = fc.record({
  ring: fc.array(fc.oneof(segment, table), { minLength: SIZE, maxLength: SIZE }),
  tables: fc.array(segment, { minLength: TABLE, maxLength: TABLE }),
  heads: fc.array(fc.nat(SIZE), { minLength: 4, maxLength: 4 }),
});
type Rings = typeof rings extends fc.Arbitrary<infer T> ? T : never;

function writeAll(memory: FlatGuestMemory, { ring, tables, heads }: Rings): void {
  ring.forEach((d, i) => write(memory, RINGS.desc, i, d));
  for (const at of [0x4000, 0x5f80]) tables.forEach((d, i) => write(memory, at, i, d));
  heads.forEach((head, i) => (memory.u16[((RINGS.driver + 4) >> 1) + i] = head));
  memory.u16[(RINGS.driver + 2) >> 1] = heads.length;
}

/** What a device gets over `memory`, up to the first buffer that is malformed: by the batch where it can, else one by one. */
function popAll(memory: DeviceMemory, batched: boolean): unknown {
  const queue = new SplitDeviceQueue({ size: SIZE, rings: RINGS, memory, eventIdx: false, indirect: true });
  const batch = new ChainBatch(4, SIZE * 4);
  const popped: unknown[] = [];
  for (;;) {
    const n = batched ? queue.popChains(batch, 4) : 0;
    for (let i = 0; i < n; i++) {
      const all = Array.from({ length: batch.end(i) - batch.start(i) }, (_, j) => batch.start(i) + j);
      popped.push([batch.head(i), batch.written(i), all.map((j) => [batch.gpa(j), batch.length(j)])]);
    }
    if (n > 0) continue;
    const chain = queue.pop();
    if (chain === null) return { popped, error: queue.error };
    popped.push([chain.head, chain.writableBytes, segmentsOf(chain)]);
  }
}

test.prop([rings], { numRuns: 500 })('buffers are the same where a window ends the one before', (written) => {
  const whole = new FlatGuestMemory(new ArrayBuffer(BYTES));
  writeAll(whole, written);
  const one = new OneWindow(whole);
  expect(popAll(one, false)).toEqual(popAll(whole, false));
  expect(popAll(one, true)).toEqual(popAll(whole, true));
});

test.prop([rings], { numRuns: 200 })(
  'buffers are the same where a first touch ends the windows before',
  (written) => {
    const still = new FlatGuestMemory(new ArrayBuffer(BYTES));
    writeAll(still, written);
    for (const batched of [false, true]) {
      const moving = new Moving(new ArrayBuffer(BYTES));
      writeAll(moving, written);
      // The rings have been touched; a table has not.
      for (const at of Object.values(RINGS)) moving.window(at, 1, true);
      expect(popAll(moving, batched)).toEqual(popAll(still, batched));
    }
  },
);

test.prop([rings, pages], { numRuns: 1000 })(
  'buffers are the same, one by one and by the batch, whatever is known of the memory around',
  (written, kinds) => {
    const buffer = new ArrayBuffer(BYTES);
    writeAll(new FlatGuestMemory(buffer), written);
    const apart = popAll(new Patchwork(buffer, kinds, false), false);
    for (const batched of [false, true]) {
      const memory = new Patchwork(buffer, kinds, true);
      expect(popAll(memory, batched)).toEqual(apart);
      const strays = [...memory.touched].filter((page) => !mayTouch(written, page));
      expect(strays).toEqual([]);
    }
  },
);

/** Whether a device has business in a page: a ring is there, or a table that a descriptor names as it should. */
function mayTouch({ ring }: Rings, page: number): boolean {
  if (Object.values(RINGS).includes(page * PAGE_SIZE)) return true;
  return ring.some(
    (d) =>
      // The device MUST ignore the write-only flag of a descriptor that refers to a table (§ 2.7.5.3.2).
      (d.flags & (VIRTQ_DESC_F_INDIRECT | VIRTQ_DESC_F_NEXT)) === VIRTQ_DESC_F_INDIRECT &&
      d.high === 0 &&
      d.length > 0 &&
      d.length % 16 === 0 &&
      page >= Math.floor(d.gpa / PAGE_SIZE) &&
      page <= Math.floor((d.gpa + d.length - 1) / PAGE_SIZE),
  );
}

/** Whether a chain in the ring's table ends in an indirect one. */
function endsInTable(ring: readonly Written[], head: number): boolean {
  let index = head;
  for (let i = 0; i < SIZE && index < SIZE; i++) {
    if ((ring[index].flags & VIRTQ_DESC_F_INDIRECT) !== 0) return true;
    if ((ring[index].flags & VIRTQ_DESC_F_NEXT) === 0) return false;
    index = ring[index].next < 0 ? index + 1 : ring[index].next;
  }
  return false;
}

/** Four GiB of RAM, of which the first bytes are here: no test touches the others. */
class Large extends FlatGuestMemory {
  override contains(gpa: number, length: number): boolean {
    return gpa + length <= 4 * GiB;
  }
  override extent(_gpa: number): boolean {
    this.to = 4 * GiB;
    return true;
  }
}

test('a buffer of more than 2 GiB together is left to `pop`, which has its bytes right', () => {
  const memory = new Large(new ArrayBuffer(BYTES));
  const flags = [VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_NEXT | VIRTQ_DESC_F_WRITE, VIRTQ_DESC_F_WRITE];
  const lengths = [0x4000_0000, 0x3fff_0000, 0x10_0000];
  flags.forEach((f, i) =>
    write(memory, RINGS.desc, i, { gpa: 0x8000, high: 0, length: lengths[i], flags: f, next: -1 }),
  );
  memory.u16[(RINGS.driver + 2) >> 1] = 1;
  const queue = new SplitDeviceQueue({
    size: SIZE,
    rings: RINGS,
    memory,
    eventIdx: false,
    indirect: false,
  });
  expect(queue.popChains(new ChainBatch(1, SIZE), 1)).toBe(0);
  const chain = queue.pop();
  expect([chain?.readableBytes, chain?.writableBytes]).toEqual([0x4000_0000, 0x400f_0000]);
});
