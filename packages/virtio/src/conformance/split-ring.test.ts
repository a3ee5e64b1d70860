/** One test per MUST of the split virtqueue (virtio 1.4 § 2.7), the sentence in its name. Over a plain buffer. */
import { describe, expect, test, vi } from 'vitest';
import { FlatGuestMemory } from '@ebb/machine';
import { RawRing, rig, RINGS, QUEUE_SIZE } from '../testing/index.ts';
import {
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_INDIRECT_DESC,
  VIRTQ_AVAIL_F_NO_INTERRUPT,
  VIRTQ_DESC_F_INDIRECT,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
  VIRTQ_USED_F_NO_NOTIFY,
} from '../uapi/index.ts';
import { SplitDriverQueue, driverQueueWords } from '../driver/index.ts';

const seg = (gpa: number, length: number): { gpa: number; length: number } => ({ gpa, length });
const descWord = (r: ReturnType<typeof rig>, index: number, word: number): number => {
  r.memory.window(RINGS.desc + index * 16 + word * 4, 4, false);
  return r.memory.i32[r.memory.at >> 2];
};
const flagsOf = (r: ReturnType<typeof rig>, index: number): number => descWord(r, index, 3) & 0xffff;
const plain = [] as const;

describe('driver', () => {
  test('The driver MUST ensure that the physical address of the first byte of each virtqueue part is a multiple of the specified alignment value', () => {
    const make = (desc: number): SplitDriverQueue =>
      new SplitDriverQueue({
        size: 4,
        rings: { ...RINGS, desc },
        state: new Int32Array(driverQueueWords(4)),
        stateBase: 0,
        eventIdx: false,
        indirect: false,
      });
    expect(() => make(0x10008)).toThrow(/page of its own/);
    expect(make(0x10000).rings.desc % 16).toBe(0);
  });

  test('The driver MUST place any device-writable descriptor elements after any device-readable descriptor elements', () => {
    const r = rig();
    r.queue.add(r.memory, [seg(0x20000, 8), seg(0x20100, 8)], [seg(0x20200, 8)], 7);
    expect([0, 1, 2].map((i) => flagsOf(r, i))).toEqual([
      VIRTQ_DESC_F_NEXT,
      VIRTQ_DESC_F_NEXT,
      VIRTQ_DESC_F_WRITE,
    ]);
  });

  test('Drivers MUST NOT add a descriptor chain longer than 2^32 bytes in total; loops in the descriptor chain are forbidden', () => {
    const r = rig();
    r.queue.add(r.memory, [seg(0x20000, 8), seg(0x20100, 8), seg(0x20200, 8)], [], 0);
    const seen = new Set<number>();
    for (let i = 0; ; i = descWord(r, i, 3) >>> 16) {
      expect(seen.has(i)).toBe(false);
      seen.add(i);
      if ((flagsOf(r, i) & VIRTQ_DESC_F_NEXT) === 0) break;
    }
    expect(seen.size).toBe(3);
    expect(() => r.queue.add(r.memory, [seg(0x30000, 2 ** 31)], [seg(0x40000, 2 ** 31 + 1)], 1)).toThrow(
      'at most 2³² bytes',
    );
    // What was refused was never made available.
    r.queue.publish(r.memory);
    expect(new RawRing(r.memory, QUEUE_SIZE, RINGS).readU16(RINGS.driver + 2)).toBe(1);
  });

  test('The driver MUST NOT set the VIRTQ_DESC_F_INDIRECT flag unless the VIRTIO_F_INDIRECT_DESC feature was negotiated', () => {
    const r = rig({ driverBits: plain });
    expect(() => r.queue.addTables(r.memory, Float64Array.of(0x20000), Int32Array.of(0), 1, 2)).toThrow(
      /INDIRECT_DESC/,
    );
  });

  test('A driver MUST NOT create a descriptor chain longer than the Queue Size of the device', () => {
    const r = rig();
    expect(() =>
      r.queue.addTables(r.memory, Float64Array.of(0x20000), Int32Array.of(0), 1, QUEUE_SIZE + 1),
    ).toThrow(/no longer than the queue/);
    const many = Array.from({ length: QUEUE_SIZE + 1 }, () => seg(0x20000, 8));
    expect(r.queue.add(r.memory, many, [], 0)).toBe(false);
  });

  test('A driver MUST NOT set both VIRTQ_DESC_F_INDIRECT and VIRTQ_DESC_F_NEXT in flags', () => {
    const r = rig();
    r.queue.addTables(r.memory, Float64Array.of(0x20000), Int32Array.of(0), 1, 3);
    expect(flagsOf(r, 0)).toBe(VIRTQ_DESC_F_INDIRECT);
  });

  test('A driver MUST NOT decrement the available idx on a virtqueue', () => {
    const r = rig();
    let last = 0;
    for (let i = 0; i < 200; i++) {
      r.queue.add(r.memory, [seg(0x20000, 8)], [], i);
      r.queue.publish(r.memory);
      r.memory.window(RINGS.driver + 2, 2, false);
      const idx = r.memory.u16[r.memory.at >> 1];
      expect((idx - last) & 0xffff).toBe(1);
      last = idx;
      const chain = r.device.queue?.pop();
      if (chain) r.device.queue?.push(chain, 0);
      r.queue.popUsed(r.memory);
    }
  });

  test('If EVENT_IDX is not negotiated, the driver MUST set [available] flags to 0 or 1', () => {
    const r = rig({ driverBits: plain });
    const flags = (): number => {
      r.memory.window(RINGS.driver, 2, false);
      return r.memory.u16[r.memory.at >> 1];
    };
    r.queue.disableInterrupts(r.memory);
    expect(flags()).toBe(VIRTQ_AVAIL_F_NO_INTERRUPT);
    r.queue.enableInterrupts(r.memory);
    expect(flags()).toBe(0);
  });

  test('If EVENT_IDX is negotiated, the driver MUST set [available] flags to 0', () => {
    const r = rig();
    r.queue.disableInterrupts(r.memory);
    r.memory.window(RINGS.driver, 2, false);
    expect(r.memory.u16[r.memory.at >> 1]).toBe(0);
  });

  test('The driver MUST handle spurious notifications from the device', () => {
    const r = rig();
    expect(r.queue.popUsed(r.memory)).toBe(-1);
    expect(r.queue.broken).toBe(false);
    expect(r.driver.takeInterrupt()).toBe(0);
  });

  test('The driver MUST NOT make assumptions about data in device-writable buffers beyond the first len bytes', () => {
    const r = rig();
    r.queue.add(r.memory, [], [seg(0x20000, 64)], 3);
    r.queue.publish(r.memory);
    const chain = r.device.queue?.pop();
    if (!chain) throw new Error('available');
    chain.write(0, new Uint8Array(5).fill(9));
    r.device.queue?.push(chain, 5);
    expect(r.queue.popUsed(r.memory)).toBe(3);
    expect(r.queue.usedLength).toBe(5);
  });

  test('The driver MUST initialize flags in the used ring to 0 when allocating the used ring', () => {
    const r = rig({ bringUp: false });
    new RawRing(r.memory, QUEUE_SIZE, RINGS).u16(RINGS.device, 0xffff);
    r.queue.reset(r.memory);
    r.memory.window(RINGS.device, 2, false);
    expect(r.memory.u16[r.memory.at >> 1]).toBe(0);
  });

  test('If EVENT_IDX is not negotiated, the driver MUST ignore the avail_event value, and if flags is 0 it MUST send a notification', () => {
    const r = rig({ driverBits: plain });
    const raw = new RawRing(r.memory, QUEUE_SIZE, RINGS);
    raw.u16(RINGS.device + 4 + 8 * QUEUE_SIZE, 77);
    r.queue.add(r.memory, [seg(0x20000, 8)], [], 0);
    expect(r.queue.publish(r.memory)).toBe(true);
    raw.u16(RINGS.device, VIRTQ_USED_F_NO_NOTIFY);
    r.queue.add(r.memory, [seg(0x20000, 8)], [], 1);
    expect(r.queue.publish(r.memory)).toBe(false);
  });

  test('If EVENT_IDX is negotiated, the driver MUST ignore the lower bit of [used] flags, and MUST notify when idx passes avail_event', () => {
    const r = rig();
    const raw = new RawRing(r.memory, QUEUE_SIZE, RINGS);
    raw.u16(RINGS.device, VIRTQ_USED_F_NO_NOTIFY);
    r.queue.add(r.memory, [seg(0x20000, 8)], [], 0);
    expect(r.queue.publish(r.memory)).toBe(true);
    r.queue.add(r.memory, [seg(0x20000, 8)], [], 1);
    expect(r.queue.publish(r.memory)).toBe(false);
    raw.u16(RINGS.device + 4 + 8 * QUEUE_SIZE, 2);
    r.queue.add(r.memory, [seg(0x20000, 8)], [], 2);
    expect(r.queue.publish(r.memory)).toBe(true);
  });

  test('The driver MUST perform a suitable memory barrier before the idx update', () => {
    const r = rig();
    const raw = new RawRing(r.memory, QUEUE_SIZE, RINGS);
    r.queue.add(r.memory, [seg(0x20000, 8)], [], 0);
    r.queue.add(r.memory, [seg(0x20000, 8)], [], 1);
    expect(r.device.queue?.hasAvail()).toBe(false);
    // An atomic store is the barrier: when it comes, both entries are in the ring.
    const entries: number[][] = [];
    const store = Atomics.store.bind(Atomics) as (a: Uint16Array, index: number, value: number) => number;
    const watch = (array: Uint16Array, index: number, value: number): number => {
      if (array === r.memory.u16 && index === (RINGS.driver + 2) >> 1)
        entries.push([raw.readU16(RINGS.driver + 4), raw.readU16(RINGS.driver + 6)]);
      return store(array, index, value);
    };
    const spy = vi.spyOn(Atomics, 'store').mockImplementation(watch as typeof Atomics.store);
    try {
      r.queue.publish(r.memory);
    } finally {
      spy.mockRestore();
    }
    expect(entries).toEqual([[0, 1]]);
    expect(r.device.queue?.hasAvail()).toBe(true);
  });

  test('The driver MUST perform a suitable memory barrier before reading flags or avail_event: idx is visible by then', () => {
    // Memory that looks, whenever the driver reads the device's ring, whether the new index is out already.
    class Watching extends FlatGuestMemory {
      readonly idxAtEventRead: number[] = [];
      override window(gpa: number, length: number, write: boolean): boolean {
        if (gpa === RINGS.device) this.idxAtEventRead.push(Atomics.load(this.u16, (RINGS.driver + 2) >> 1));
        return super.window(gpa, length, write);
      }
    }
    const memory = new Watching(new ArrayBuffer(1 << 20));
    const r = rig({ memory });
    r.queue.add(memory, [seg(0x20000, 8)], [], 0);
    memory.idxAtEventRead.length = 0;
    r.queue.publish(memory);
    expect(memory.idxAtEventRead).toEqual([1]);
  });
});

describe('device', () => {
  const withChain = (
    write: (raw: RawRing) => void,
    bits?: readonly number[],
  ): ReturnType<typeof rig> & { raw: RawRing } => {
    const r = rig(bits === undefined ? {} : { driverBits: bits });
    const raw = new RawRing(r.memory, QUEUE_SIZE, RINGS);
    write(raw);
    return { ...r, raw };
  };

  test('The device MUST NOT make assumptions about the particular arrangement of descriptors', () => {
    const r = withChain((raw) => {
      // Sixteen readable bytes in three odd pieces, out of order in the table.
      raw.desc(9, 0x20000, 3, VIRTQ_DESC_F_NEXT, 2);
      raw.desc(2, 0x20fff, 2, VIRTQ_DESC_F_NEXT, 60);
      raw.desc(60, 0x21800, 11, 0);
      raw.avail(9);
    });
    const chain = r.device.queue?.pop();
    expect(chain?.readableBytes).toBe(16);
    expect(chain?.read(0, new Uint8Array(16))).toBe(16);
  });

  test('A device MUST NOT write to a device-readable buffer', () => {
    const r = withChain((raw) => {
      raw.desc(0, 0x20000, 16, 0);
      raw.avail(0);
    });
    const chain = r.device.queue?.pop();
    expect(chain?.write(0, new Uint8Array([1, 2, 3]))).toBe(0);
    expect(r.raw.readU32(0x20000)).toBe(0);
  });

  test('A device MUST NOT write to any descriptor table entry', () => {
    const r = withChain((raw) => {
      raw.desc(0, 0x20000, 16, VIRTQ_DESC_F_WRITE);
      raw.avail(0);
    });
    const before = [0, 1, 2, 3].map((w) => descWord(r, 0, w));
    const chain = r.device.queue?.pop();
    if (chain) r.device.queue?.push(chain, 4);
    expect([0, 1, 2, 3].map((w) => descWord(r, 0, w))).toEqual(before);
  });

  test('The device MUST ignore the write-only flag in the descriptor that refers to an indirect table', () => {
    const r = withChain((raw) => {
      raw.desc(0, 0x20000, 16, 0, 0, 0x30000);
      raw.desc(0, 0x30000, 16, VIRTQ_DESC_F_INDIRECT | VIRTQ_DESC_F_WRITE);
      raw.avail(0);
    });
    const chain = r.device.queue?.pop();
    expect([chain?.readableSegments, chain?.writableSegments]).toEqual([1, 0]);
  });

  test('The device MUST handle the case of zero or more normal chained descriptors followed by a single descriptor with flags&VIRTQ_DESC_F_INDIRECT', () => {
    const r = withChain((raw) => {
      raw.desc(0, 0x21000, 16, VIRTQ_DESC_F_NEXT, 1);
      raw.desc(0, 0x20000, 16, VIRTQ_DESC_F_NEXT, 1, 0x30000);
      raw.desc(1, 0x20100, 16, VIRTQ_DESC_F_WRITE, 0, 0x30000);
      raw.desc(1, 0x30000, 32, VIRTQ_DESC_F_INDIRECT);
      raw.avail(0);
    });
    const chain = r.device.queue?.pop();
    expect([chain?.readableSegments, chain?.writableSegments]).toEqual([2, 1]);
  });

  const used = (r: ReturnType<typeof withChain>): void => {
    r.raw.desc(0, 0x20000, 16, VIRTQ_DESC_F_WRITE);
    r.raw.avail(0);
    const chain = r.device.queue?.pop();
    if (chain) r.device.queue?.push(chain, 0);
  };

  test('If EVENT_IDX is not negotiated, the device MUST ignore the used_event value, and if flags is 0 it MUST send a notification', () => {
    const r = withChain((raw) => raw.usedEvent(40), []);
    used(r);
    expect(r.device.queue?.needsInterrupt()).toBe(true);
    r.raw.availFlags(VIRTQ_AVAIL_F_NO_INTERRUPT);
    used(r);
    expect(r.device.queue?.needsInterrupt()).toBe(false);
  });

  test('If EVENT_IDX is negotiated, the device MUST ignore the lower bit of flags, and MUST notify when used idx was equal to used_event', () => {
    const r = withChain((raw) => raw.availFlags(VIRTQ_AVAIL_F_NO_INTERRUPT), [VIRTIO_F_EVENT_IDX]);
    used(r);
    expect(r.device.queue?.needsInterrupt()).toBe(true);
    used(r);
    expect(r.device.queue?.needsInterrupt()).toBe(false);
    r.raw.usedEvent(2);
    used(r);
    expect(r.device.queue?.needsInterrupt()).toBe(true);
  });

  test('a batch that passes used_event in its middle is notified of', () => {
    const r = withChain((raw) => raw.usedEvent(1), [VIRTIO_F_EVENT_IDX]);
    for (let i = 0; i < 4; i++) {
      r.raw.desc(i, 0x20000 + 16 * i, 16, VIRTQ_DESC_F_WRITE);
      r.raw.avail(i);
    }
    const heads = new Int32Array(4);
    expect(r.device.queue?.popSingles(heads, new Float64Array(4), new Int32Array(4), 4)).toBe(4);
    r.device.queue?.pushSingles(heads, 4, 16);
    expect([r.raw.usedIdx, r.device.queue?.needsInterrupt()]).toEqual([4, true]);
  });

  test('The device MUST set len prior to updating the used idx, and MUST write at least len bytes', () => {
    const r = withChain((raw) => {
      raw.desc(0, 0x20000, 16, VIRTQ_DESC_F_WRITE);
      raw.avail(0);
    });
    const chain = r.device.queue?.pop();
    if (!chain) throw new Error('available');
    expect(chain.write(0, new Uint8Array(12).fill(7))).toBe(12);
    expect(r.raw.usedIdx).toBe(0);
    // `fill` sets the entry, `publish` the index.
    r.device.queue?.fill(chain, 12);
    expect([r.raw.used(0), r.raw.usedIdx]).toEqual([{ id: 0, length: 12 }, 0]);
    r.device.queue?.publish();
    expect(r.raw.usedIdx).toBe(1);
  });

  test('a device that claims more than the writable part holds is not believed (I21)', () => {
    const r = withChain((raw) => {
      raw.desc(0, 0x20000, 16, VIRTQ_DESC_F_WRITE);
      raw.avail(0);
    });
    const chain = r.device.queue?.pop();
    if (!chain) throw new Error('available');
    r.device.queue?.push(chain, 99);
    expect(r.raw.used(0)).toEqual({ id: 0, length: 16 });
  });

  test('If EVENT_IDX is not negotiated, the device MUST set [used] flags to 0 or 1', () => {
    const r = withChain(() => undefined, []);
    r.device.queue?.disableKicks();
    expect(r.raw.usedFlags).toBe(1);
    r.device.queue?.enableKicks();
    expect(r.raw.usedFlags).toBe(0);
  });

  test('If EVENT_IDX is negotiated, the device MUST set [used] flags to 0', () => {
    const r = withChain(() => undefined, [VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC]);
    r.device.queue?.disableKicks();
    expect(r.raw.usedFlags).toBe(0);
  });

  test('The device MUST handle spurious notifications from the driver', () => {
    const r = withChain(() => undefined);
    r.driver.kick(0);
    r.driver.kick(0);
    expect(r.device.queue?.pop()).toBe(null);
    expect(r.device.queue?.error).toBe(null);
  });
});

/** A megabyte of RAM that begins at 4 GiB. */
class HighMemory extends FlatGuestMemory {
  override contains(gpa: number, length: number, write: boolean): boolean {
    return super.contains(gpa - HIGH, length, write);
  }
  override window(gpa: number, length: number, write: boolean): boolean {
    if (!this.contains(gpa, length, write)) return false;
    this.at = gpa - HIGH;
    return true;
  }
}
const HIGH = 0x1_0000_0000;

test('rings, buffers and indirect tables above 4 GiB: all 64 bits of an address count', () => {
  const memory = new HighMemory(new ArrayBuffer(1 << 20));
  const rings = { desc: HIGH + RINGS.desc, driver: HIGH + RINGS.driver, device: HIGH + RINGS.device };
  const r = rig({ memory, rings });
  memory.u8.fill(7, 0x20000, 0x20008);
  r.queue.add(memory, [seg(HIGH + 0x20000, 8)], [seg(HIGH + 0x21000, 8)], 5);
  // A table of one: the same eight bytes.
  const table = 0x30000;
  memory.i32.set([0x20000, 1, 8, 0], table >> 2);
  r.queue.addTables(memory, Float64Array.of(HIGH + table), Int32Array.of(6), 1, 1);
  r.queue.addSingles(memory, Float64Array.of(HIGH + 0x22000), Int32Array.of(7), 1, 16, true);
  r.queue.publish(memory);
  const bytes = new Uint8Array(8);
  const direct = r.device.queue?.pop();
  expect([direct?.read(0, bytes), [...bytes], direct?.write(0, bytes)]).toEqual([8, [...bytes.fill(7)], 8]);
  const indirect = r.device.queue?.pop();
  expect([indirect?.gpas[0], indirect?.read(0, bytes)]).toEqual([HIGH + 0x20000, 8]);
  const single = r.device.queue?.pop();
  expect([single?.gpas[0], single?.writableBytes]).toEqual([HIGH + 0x22000, 16]);
  for (const chain of [direct, indirect, single]) if (chain) r.device.queue?.push(chain, 0);
  expect([r.queue.popUsed(memory), r.queue.popUsed(memory), r.queue.popUsed(memory), r.queue.broken]).toEqual(
    [5, 6, 7, false],
  );
});

test('the batch path and the single path of the driver take turns: what one published or saw, the other knows', () => {
  const r = rig({ driverBits: [] });
  const gpas = Float64Array.of(0x20000, 0x20100);
  const tokens = new Int32Array(8);
  r.queue.addSingles(r.memory, gpas, Int32Array.of(0, 1), 2, 16, false);
  // Nobody asked for silence: a batch is worth a kick like a single buffer.
  expect(r.queue.needsKick(r.memory)).toBe(true);
  const returnAll = (): void => {
    for (let chain = r.device.queue?.pop(); chain; chain = r.device.queue?.pop())
      r.device.queue?.push(chain, 0);
  };
  returnAll();
  expect(r.queue.popUsedBatch(r.memory, tokens, 8)).toBe(2);
  // Nothing more has come back; the entries that were reaped are not reaped again.
  expect([r.queue.popUsed(r.memory), r.queue.broken]).toEqual([-1, false]);
  r.queue.add(r.memory, [seg(0x20000, 8)], [], 9);
  r.queue.publish(r.memory);
  returnAll();
  expect([r.queue.popUsed(r.memory), r.queue.broken]).toEqual([9, false]);
});

test('a chain that goes on in an indirect table is no longer than the queue, all counted', () => {
  const r = rig();
  const raw = new RawRing(r.memory, QUEUE_SIZE, RINGS);
  for (let i = 0; i < QUEUE_SIZE; i++)
    raw.desc(i, 0x20000, 8, i < QUEUE_SIZE - 1 ? VIRTQ_DESC_F_NEXT : 0, i + 1, 0x30000);
  raw.desc(0, 0x21000, 8, VIRTQ_DESC_F_NEXT, 1);
  raw.desc(1, 0x30000, 16 * QUEUE_SIZE, VIRTQ_DESC_F_INDIRECT);
  raw.avail(0);
  expect([r.device.queue?.pop(), r.device.queue?.error?.kind]).toEqual([null, 'chain-too-long']);
});

test('a buffer for the device to write is refused where memory is read-only', () => {
  class HalfReadOnly extends FlatGuestMemory {
    override contains(gpa: number, length: number, write: boolean): boolean {
      return super.contains(gpa, length, write) && !(write && gpa >= 0x80000);
    }
    override extent(): boolean {
      return false;
    }
  }
  const memory = new HalfReadOnly(new ArrayBuffer(1 << 20));
  const r = rig({ memory });
  r.queue.add(memory, [seg(0x80000, 16)], [], 0);
  r.queue.add(memory, [], [seg(0x80000, 16)], 1);
  r.queue.publish(memory);
  expect(r.device.queue?.pop()?.readableBytes).toBe(16);
  expect([r.device.queue?.pop(), r.device.queue?.error?.kind]).toEqual([null, 'buffer-not-in-ram']);
});
