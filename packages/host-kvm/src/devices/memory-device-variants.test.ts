/** Requests that no specification has: more memory (H37), and blocks traded for others (H44, H63). */
import { describe, expect, test } from 'vitest';
import { PAGE_SIZE } from '@ebb/machine';
import {
  EBB_MEM_REQ_EXCHANGE,
  EBB_MEM_REQ_MORE,
  INTERRUPT_CONFIG_CHANGE,
  STATUS_DEVICE_NEEDS_RESET,
  VIRTIO_MEM_REQ_PLUG,
  VIRTIO_MEM_RESP_ACK,
  VIRTIO_MEM_RESP_BUSY,
  VIRTIO_MEM_RESP_ERROR,
  VIRTIO_MEM_RESP_NACK,
} from '@ebb/virtio/uapi';
import { type MemoryDeviceOptions } from './memory-device.ts';
import { ADDR, at, bench, BLOCK, REGION, type Bench } from './testing-memory-device.ts';

test('a guest that asks for more gets what the host grants, in whole blocks, and is told (H37)', () => {
  const asked: number[] = [];
  const grant = (bytes: number): number => {
    asked.push(bytes);
    return asked.length === 1 ? 2.5 * BLOCK : 0;
  };
  const b = bench('a VM of this host', { requestedBytes: 2 * BLOCK, grant });
  const more = (blocks: number): number => b.request(EBB_MEM_REQ_MORE, ADDR, blocks).type;
  expect(more(4)).toBe(VIRTIO_MEM_RESP_ACK);
  expect([asked[0], b.device.requestedBytes]).toEqual([4 * BLOCK, 4 * BLOCK]);
  expect(b.driver.takeInterrupt() & INTERRUPT_CONFIG_CHANGE).not.toBe(0);
  expect(more(4)).toBe(VIRTIO_MEM_RESP_NACK);
  expect(b.device.requestedBytes).toBe(4 * BLOCK);
  // Never more than the region has.
  expect(more(100)).toBe(VIRTIO_MEM_RESP_NACK);
  expect(asked[2]).toBe(REGION - 4 * BLOCK);
  expect(b.device.counters.moreRequests).toBe(3);
});

test('without the feature, asking for more is an unknown request', () => {
  const b = bench('a VM of this host', { requestedBytes: 2 * BLOCK });
  b.request(EBB_MEM_REQ_MORE, ADDR, 1);
  expect(b.driver.status & STATUS_DEVICE_NEEDS_RESET).not.toBe(0);
});

describe('an exchange (H44, H63)', () => {
  const trading = (
    over: Partial<MemoryDeviceOptions> = {},
  ): Bench & { exchange: (from: number, to: number, n?: number) => number } => {
    const b = bench('a VM of this host', { requestedBytes: 4 * BLOCK, exchanges: true, ...over });
    b.request(VIRTIO_MEM_REQ_PLUG, at(0), 4);
    return { ...b, exchange: (from, to, n = 1) => b.request(EBB_MEM_REQ_EXCHANGE, at(from), n, 0, to).type };
  };
  const plugged = (b: Bench): number[] => b.plugged().flatMap((is, block) => (is ? [block] : []));

  test('plugs blocks for others that go, though the size that is asked for is reached', () => {
    const sizes: number[] = [];
    const b = trading({ onSize: (bytes) => void sizes.push(bytes / BLOCK) });
    expect(b.request(VIRTIO_MEM_REQ_PLUG, at(8), 1).type).toBe(VIRTIO_MEM_RESP_NACK);
    expect(b.exchange(1, 8, 2)).toBe(VIRTIO_MEM_RESP_ACK);
    expect(plugged(b)).toEqual([0, 3, 8, 9]);
    expect([b.device.pluggedBytes, b.discards.at(-1)]).toEqual([
      4 * BLOCK,
      [at(1) / PAGE_SIZE, (2 * BLOCK) / PAGE_SIZE],
    ]);
    // Both are there for a moment, which makes it harder on a host than either request; nobody is told of it.
    expect(sizes).toEqual([4]);
  });

  test.each([
    ['of a block that is not plugged', 5, 8],
    ['for a block that is plugged', 0, 3],
    ['for itself', 0, 0],
    ['for what is half plugged', 0, 3],
    ['outside the region', 0, 16],
    ['for a block far outside', 0, 0xffff_ffff],
  ])('%s is an ERROR and changes nothing', (_what, from, to) => {
    const b = trading();
    expect(b.exchange(from, to)).toBe(VIRTIO_MEM_RESP_ERROR);
    expect([plugged(b), b.device.pluggedBytes, b.discards]).toEqual([[0, 1, 2, 3], 4 * BLOCK, []]);
  });

  test.each([
    ['does not let the old blocks go', { map: () => true, unmap: () => false }, []],
    [
      'cannot have the new ones',
      { map: (gfn: number) => gfn < at(8) / PAGE_SIZE, unmap: () => true },
      [at(1)],
    ],
  ])('is BUSY and changes nothing where a holder %s', (_what, holder, backAgain) => {
    const mapped: number[] = [];
    const map = (gfn: number): boolean => {
      mapped.push(gfn * PAGE_SIZE);
      return holder.map(gfn);
    };
    const b = trading({ holder: { map, unmap: holder.unmap } });
    mapped.length = 0;
    expect(b.exchange(1, 8)).toBe(VIRTIO_MEM_RESP_BUSY);
    expect([plugged(b), b.device.pluggedBytes]).toEqual([[0, 1, 2, 3], 4 * BLOCK]);
    // The old ones are the holder's again.
    expect(mapped.filter((addr) => addr < at(8))).toEqual(backAgain);
  });

  test('that has begun is carried out, whatever the host begins meanwhile', () => {
    const b = trading({ holder: { map: () => true, unmap: () => true } });
    const discards = b.discards.length;
    Object.defineProperty(b.device, 'busy', { get: () => b.discards.length > discards, configurable: true });
    expect(b.exchange(1, 8)).toBe(VIRTIO_MEM_RESP_ACK);
    expect(plugged(b)).toEqual([0, 2, 3, 8]);
  });

  test('is BUSY while a migration runs, and unknown without the feature', () => {
    const b = trading();
    b.device.busy = true;
    expect(b.exchange(1, 8)).toBe(VIRTIO_MEM_RESP_BUSY);
    expect(plugged(b)).toEqual([0, 1, 2, 3]);
    const without = trading({ exchanges: false });
    without.exchange(1, 8);
    expect(without.driver.status & STATUS_DEVICE_NEEDS_RESET).not.toBe(0);
  });
});
