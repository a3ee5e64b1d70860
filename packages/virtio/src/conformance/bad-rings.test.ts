/** Malformed rings: each gets its error, the device asks for a reset, nothing else is touched (DESIGN § 8). */
import { describe, expect, test } from 'vitest';
import { FlatGuestMemory } from '@ebb/machine';
import { SplitDeviceQueue } from '../device/index.ts';
import { RawRing, rig, RINGS, QUEUE_SIZE } from '../testing/index.ts';
import { VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE } from '../uapi/index.ts';

const popError = (write: (raw: RawRing) => void, bits?: readonly number[]): string | undefined => {
  const r = rig(bits === undefined ? {} : { driverBits: bits });
  write(new RawRing(r.memory, QUEUE_SIZE, RINGS));
  expect(r.device.queue?.pop()).toBe(null);
  // The queue stays broken and yields nothing more.
  expect(r.device.queue?.pop()).toBe(null);
  return r.device.queue?.error?.kind;
};

describe('a malformed ring breaks the queue', () => {
  test('a descriptor loop is a chain that is too long', () => {
    expect(
      popError((raw) => {
        raw.desc(0, 0x20000, 8, VIRTQ_DESC_F_NEXT, 1);
        raw.desc(1, 0x20000, 8, VIRTQ_DESC_F_NEXT, 0);
        raw.avail(0);
      }),
    ).toBe('chain-too-long');
  });
  test('an address outside RAM', () => {
    expect(
      popError((raw) => {
        raw.desc(0, 0x7fff_ffff_f000, 8, 0);
        raw.avail(0);
      }),
    ).toBe('buffer-not-in-ram');
  });
  test('a buffer that runs off the end of RAM', () => {
    expect(
      popError((raw) => {
        raw.desc(0, (1 << 20) - 8, 64, 0);
        raw.avail(0);
      }),
    ).toBe('buffer-not-in-ram');
  });
  test('a zero length', () => {
    expect(
      popError((raw) => {
        raw.desc(0, 0x20000, 0, 0);
        raw.avail(0);
      }),
    ).toBe('zero-length');
  });
  test('lengths that add up to more than 2^32 bytes', () => {
    // A guest with endless RAM: only the sum is wrong.
    class Endless extends FlatGuestMemory {
      override contains(gpa: number, length: number, write: boolean): boolean {
        return gpa < this.size ? super.contains(gpa, length, write) : true;
      }
    }
    const r = rig({ memory: new Endless(new ArrayBuffer(1 << 20)) });
    const raw = new RawRing(r.memory, QUEUE_SIZE, RINGS);
    raw.desc(0, 0x1_0000_0000, 0xffff_f000, VIRTQ_DESC_F_NEXT, 1);
    raw.desc(1, 0x3_0000_0000, 0xffff_f000, 0);
    raw.avail(0);
    expect(r.device.queue?.pop()).toBe(null);
    expect(r.device.queue?.error?.kind).toBe('too-many-bytes');
  });
  test('an indirect table inside an indirect table', () => {
    expect(
      popError((raw) => {
        raw.desc(0, 0x31000, 16, VIRTQ_DESC_F_INDIRECT, 0, 0x30000);
        raw.desc(0, 0x30000, 16, VIRTQ_DESC_F_INDIRECT);
        raw.avail(0);
      }),
    ).toBe('indirect-nested');
  });
  test('an indirect table with NEXT', () => {
    expect(
      popError((raw) => {
        raw.desc(0, 0x30000, 16, VIRTQ_DESC_F_INDIRECT | VIRTQ_DESC_F_NEXT, 1);
        raw.avail(0);
      }),
    ).toBe('indirect-with-next');
  });
  test('an indirect table of a length that is not whole descriptors', () => {
    expect(
      popError((raw) => {
        raw.desc(0, 0x30000, 24, VIRTQ_DESC_F_INDIRECT);
        raw.avail(0);
      }),
    ).toBe('indirect-length');
  });
  test('an indirect table that was not negotiated', () => {
    expect(
      popError((raw) => {
        raw.desc(0, 0x30000, 16, VIRTQ_DESC_F_INDIRECT);
        raw.avail(0);
      }, []),
    ).toBe('indirect-not-negotiated');
  });
  test('a readable descriptor after a writable one', () => {
    expect(
      popError((raw) => {
        raw.desc(0, 0x20000, 8, VIRTQ_DESC_F_NEXT | VIRTQ_DESC_F_WRITE, 1);
        raw.desc(1, 0x20000, 8, 0);
        raw.avail(0);
      }),
    ).toBe('readable-after-writable');
  });
  test('a next index outside the table', () => {
    expect(
      popError((raw) => {
        raw.desc(0, 0x20000, 8, VIRTQ_DESC_F_NEXT, 500);
        raw.avail(0);
      }),
    ).toBe('next-out-of-range');
  });
  test('a head outside the table', () => {
    expect(popError((raw) => raw.avail(QUEUE_SIZE))).toBe('head-out-of-range');
  });
  test('an available index that jumps by more than the queue size', () => {
    expect(popError((raw) => raw.availIdx(QUEUE_SIZE + 1))).toBe('avail-index-jump');
  });
  test('an indirect chain longer than the queue is bounded', () => {
    expect(
      popError((raw) => {
        for (let i = 0; i < 200; i++) raw.desc(i, 0x20000, 1, VIRTQ_DESC_F_NEXT, i + 1, 0x30000);
        raw.desc(0, 0x30000, 200 * 16, VIRTQ_DESC_F_INDIRECT);
        raw.avail(0);
      }),
    ).toBe('chain-too-long');
  });
});

describe('what a device may not do with a buffer', () => {
  test('a device that touches a buffer after it returned it breaks its lease, and is refused', () => {
    const broken: number[] = [];
    const r = rig();
    const raw = new RawRing(r.memory, QUEUE_SIZE, RINGS);
    raw.desc(0, 0x20000, 16, VIRTQ_DESC_F_WRITE);
    raw.avail(0);
    const queue = new SplitDeviceQueue({
      size: QUEUE_SIZE,
      rings: RINGS,
      memory: r.memory,
      eventIdx: false,
      indirect: false,
      onLeaseBroken: (gpa) => void broken.push(gpa),
    });
    const chain = queue.pop();
    if (chain === null) throw new Error('available');
    queue.push(chain, 0);
    expect(chain.write(0, new Uint8Array([1]))).toBe(0);
    expect(broken).toEqual([0x20000]);
    expect(raw.readU32(0x20000)).toBe(0);
  });
  test('the descriptor is copied once: a guest that rewrites it afterwards changes nothing', () => {
    const r = rig();
    const raw = new RawRing(r.memory, QUEUE_SIZE, RINGS);
    raw.desc(0, 0x20000, 16, VIRTQ_DESC_F_WRITE);
    raw.avail(0);
    const chain = r.device.queue?.pop();
    raw.desc(0, 0x40000, 4096, VIRTQ_DESC_F_WRITE);
    expect([chain?.gpas[0], chain?.writableBytes]).toEqual([0x20000, 16]);
  });
});

test('an indirect table lies anywhere: only the ring itself has an alignment (§ 2.7)', () => {
  for (const table of [0x20008, 0x20ff8, 0x20002, 0x20fff]) {
    const r = rig();
    const raw = new RawRing(r.memory, QUEUE_SIZE, RINGS);
    const bytes = new Uint8Array(32);
    const view = new DataView(bytes.buffer);
    [
      [0x30000, 16, VIRTQ_DESC_F_NEXT, 1],
      [0x31000, 64, VIRTQ_DESC_F_WRITE, 0],
    ].forEach(([gpa, length, flags, next], i) => {
      view.setBigUint64(16 * i, BigInt(gpa), true);
      view.setUint32(16 * i + 8, length, true);
      view.setUint16(16 * i + 12, flags, true);
      view.setUint16(16 * i + 14, next, true);
    });
    bytes.forEach((byte, i) => {
      r.memory.window(table + i, 1, true);
      r.memory.u8[r.memory.at] = byte;
    });
    raw.desc(0, table, 32, VIRTQ_DESC_F_INDIRECT);
    raw.avail(0);
    const chain = r.device.queue?.pop();
    expect([chain?.segments, chain?.readableBytes, chain?.writableBytes, r.device.queue?.error]).toEqual([
      2,
      16,
      64,
      null,
    ]);
  }
  // Its second half is no RAM.
  const r = rig();
  const raw = new RawRing(r.memory, QUEUE_SIZE, RINGS);
  raw.desc(0, r.memory.u8.length - 8, 16, VIRTQ_DESC_F_INDIRECT);
  raw.avail(0);
  expect([r.device.queue?.pop(), r.device.queue?.error?.kind]).toEqual([null, 'ring-not-in-ram']);
});
