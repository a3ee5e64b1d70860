/**
 * The memory device: a test per MUST of virtio 1.2 § 5.15 that concerns it, over a VM's memory and over a plain buffer;
 * every request sequence against an independent model; and what each profile lets a guest do with unplugged memory.
 */
import { fc } from '@fast-check/vitest';
import { describe, expect, test } from 'vitest';
import { MiB, PAGE_SIZE } from '@ebb/machine';
import {
  MEM_CFG_ADDR,
  MEM_CFG_BLOCK_SIZE,
  MEM_CFG_NODE_ID,
  MEM_CFG_PLUGGED_SIZE,
  MEM_CFG_REGION_SIZE,
  MEM_CFG_REQUESTED_SIZE,
  MEM_CFG_USABLE_REGION_SIZE,
  STATUS_DEVICE_NEEDS_RESET,
  VIRTIO_MEM_REQ_PLUG,
  VIRTIO_MEM_REQ_STATE,
  VIRTIO_MEM_REQ_UNPLUG,
  VIRTIO_MEM_REQ_UNPLUG_ALL,
  VIRTIO_MEM_RESP_ACK,
  VIRTIO_MEM_RESP_BUSY,
  VIRTIO_MEM_RESP_ERROR,
  VIRTIO_MEM_RESP_NACK,
  VIRTIO_MEM_STATE_MIXED,
  VIRTIO_MEM_STATE_PLUGGED,
  VIRTIO_MEM_STATE_UNPLUGGED,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
} from '@ebb/virtio/uapi';
import {
  ADDR,
  at,
  bench,
  BLOCK,
  BLOCKS,
  REGION,
  worlds,
  REQUEST,
  RESPONSE,
  type MemoryAnswer,
} from './testing-memory-device.ts';

describe.each(worlds)('over %s', (world) => {
  test('5.15.4: The configuration layout is as struct virtio_mem_config says', () => {
    const { driver, device } = bench(world, { requestedBytes: 4 * BLOCK });
    expect(driver.readConfig64(MEM_CFG_BLOCK_SIZE)).toBe(BLOCK);
    expect(driver.readConfig32(MEM_CFG_NODE_ID) & 0xffff).toBe(3);
    expect(driver.readConfig64(MEM_CFG_ADDR)).toBe(ADDR);
    expect(driver.readConfig64(MEM_CFG_REGION_SIZE)).toBe(REGION);
    expect(driver.readConfig64(MEM_CFG_USABLE_REGION_SIZE)).toBe(device.usableBytes);
    expect(driver.readConfig64(MEM_CFG_PLUGGED_SIZE)).toBe(0);
    expect(driver.readConfig64(MEM_CFG_REQUESTED_SIZE)).toBe(4 * BLOCK);
  });

  test('5.15.4.2: The device MUST NOT change block_size, node_id, addr and region_size: writes are without effect', () => {
    const { driver } = bench(world);
    for (let offset = 0; offset < 56; offset += 4) driver.writeConfig32(offset, 0xffffffff);
    expect(driver.readConfig64(MEM_CFG_BLOCK_SIZE)).toBe(BLOCK);
    expect(driver.readConfig32(MEM_CFG_NODE_ID) & 0xffff).toBe(3);
    expect(driver.readConfig64(MEM_CFG_ADDR)).toBe(ADDR);
    expect(driver.readConfig64(MEM_CFG_REGION_SIZE)).toBe(REGION);
  });

  test('5.15.4.2: The device MUST change plugged_size to reflect the size of plugged memory blocks', () => {
    const { driver, request } = bench(world);
    request(VIRTIO_MEM_REQ_PLUG, at(0), 5);
    expect(driver.readConfig64(MEM_CFG_PLUGGED_SIZE)).toBe(5 * BLOCK);
    request(VIRTIO_MEM_REQ_UNPLUG, at(1), 2);
    expect(driver.readConfig64(MEM_CFG_PLUGGED_SIZE)).toBe(3 * BLOCK);
    request(VIRTIO_MEM_REQ_UNPLUG_ALL, 0, 0);
    expect(driver.readConfig64(MEM_CFG_PLUGGED_SIZE)).toBe(0);
  });

  test('5.15.4.2: The device MUST set usable_region_size to requested_size or greater, and MUST NOT shrink it except when processing an UNPLUG ALL request or during a system reset', () => {
    const { device, request } = bench(world, { requestedBytes: 0 });
    expect(device.usableBytes).toBe(0);
    device.setRequested(8 * BLOCK);
    const grown = device.usableBytes;
    expect(grown).toBeGreaterThanOrEqual(8 * BLOCK);
    device.setRequested(0);
    expect(device.usableBytes).toBe(grown);
    expect(request(VIRTIO_MEM_REQ_UNPLUG_ALL, 0, 0).type).toBe(VIRTIO_MEM_RESP_ACK);
    expect(device.usableBytes).toBe(0);
    device.setRequested(8 * BLOCK);
    device.setRequested(0);
    expect([...device.systemReset('virtio-1.2')]).toEqual([]);
    expect(device.usableBytes).toBe(0);
  });

  test('5.15.6.2: blocks outside the usable region are an ERROR; it is 256 MiB more than requested, and no more than the region', () => {
    const b = bench(world, { regionBytes: 1024 * MiB, requestedBytes: 64 * MiB });
    const state = (block: number, n = 1): number => b.request(VIRTIO_MEM_REQ_STATE, at(block), n).type;
    expect([state(319), state(320), state(319, 2)]).toEqual([
      VIRTIO_MEM_RESP_ACK,
      VIRTIO_MEM_RESP_ERROR,
      VIRTIO_MEM_RESP_ERROR,
    ]);
    b.device.setRequested(512 * MiB);
    expect([state(767), state(768)]).toEqual([VIRTIO_MEM_RESP_ACK, VIRTIO_MEM_RESP_ERROR]);
    b.device.setRequested(0);
    expect([state(767), state(768)]).toEqual([VIRTIO_MEM_RESP_ACK, VIRTIO_MEM_RESP_ERROR]);
    b.device.setRequested(1000 * MiB);
    expect([state(1023), state(1024)]).toEqual([VIRTIO_MEM_RESP_ACK, VIRTIO_MEM_RESP_ERROR]);
    b.device.setRequested(64 * MiB);
    expect(b.request(VIRTIO_MEM_REQ_UNPLUG_ALL, 0, 0).type).toBe(VIRTIO_MEM_RESP_ACK);
    expect([state(319), state(320)]).toEqual([VIRTIO_MEM_RESP_ACK, VIRTIO_MEM_RESP_ERROR]);
  });

  test('5.15.4.2: The device MUST send a configuration update notification when changing requested_size, SHOULD NOT when changing plugged_size', () => {
    const { device, driver, request } = bench(world, { requestedBytes: 0 });
    device.setRequested(4 * BLOCK);
    expect(driver.takeInterrupt() & 2).toBe(2);
    request(VIRTIO_MEM_REQ_PLUG, at(0), 1);
    expect(driver.takeInterrupt() & 2).toBe(0);
  });

  test('5.15.5.2: The device MUST NOT change the state of memory blocks, nor modify plugged memory, during device reset', () => {
    const { device, driver, request, memory } = bench(world);
    request(VIRTIO_MEM_REQ_PLUG, at(2), 3);
    memory.window(at(2), 4, true);
    memory.i32[memory.at >> 2] = 0x600d;
    driver.reset();
    expect(device.pluggedBytes).toBe(3 * BLOCK);
    memory.window(at(2), 4, false);
    expect(memory.i32[memory.at >> 2]).toBe(0x600d);
  });

  test.each([
    ['addr is not aligned to the block_size', at(0) + 4096, 1],
    ['nb_blocks is not greater than 0', at(0), 0],
    ['a block is outside of the usable region, above it', at(BLOCKS - 1), 2],
    ['a block is outside of the usable region, below it', ADDR - BLOCK, 1],
    ['the range reaches past the end of addresses', 2 ** 52, 65535],
  ])('5.15.6.2, .4, .8: The device MUST reject requests with ERROR if %s', (_why, addr, nrBlocks) => {
    const { request, plugged } = bench(world);
    const before = plugged();
    for (const type of [VIRTIO_MEM_REQ_PLUG, VIRTIO_MEM_REQ_UNPLUG, VIRTIO_MEM_REQ_STATE])
      expect(request(type, addr, nrBlocks).type).toBe(VIRTIO_MEM_RESP_ERROR);
    expect(plugged()).toEqual(before);
  });

  test('5.15.6.2: The device MUST reject PLUG requests with ERROR if any memory block covered is already plugged', () => {
    const { request, plugged } = bench(world);
    request(VIRTIO_MEM_REQ_PLUG, at(3), 1);
    const before = plugged();
    expect(request(VIRTIO_MEM_REQ_PLUG, at(2), 3).type).toBe(VIRTIO_MEM_RESP_ERROR);
    expect(plugged()).toEqual(before);
  });

  test('5.15.6.4: The device MUST reject UNPLUG requests with ERROR if any memory block covered is already unplugged', () => {
    const { request, plugged } = bench(world);
    request(VIRTIO_MEM_REQ_PLUG, at(2), 3);
    const before = plugged();
    expect(request(VIRTIO_MEM_REQ_UNPLUG, at(2), 4).type).toBe(VIRTIO_MEM_RESP_ERROR);
    expect(plugged()).toEqual(before);
  });

  test('5.15.6.2, .4: The device MUST acknowledge with ACK in case all memory blocks were successfully (un)plugged', () => {
    const { request, plugged } = bench(world);
    expect(request(VIRTIO_MEM_REQ_PLUG, at(2), 3).type).toBe(VIRTIO_MEM_RESP_ACK);
    expect(plugged().map(Number).join('')).toBe('0011100000000000');
    expect(request(VIRTIO_MEM_REQ_UNPLUG, at(3), 2).type).toBe(VIRTIO_MEM_RESP_ACK);
    expect(plugged().map(Number).join('')).toBe('0010000000000000');
  });

  test('5.15.6.6: The device MUST set plugged_size to 0 in case UNPLUG ALL is acknowledged', () => {
    const { device, request } = bench(world);
    request(VIRTIO_MEM_REQ_PLUG, at(0), BLOCKS);
    expect(request(VIRTIO_MEM_REQ_UNPLUG_ALL, 0, 0).type).toBe(VIRTIO_MEM_RESP_ACK);
    expect(device.pluggedBytes).toBe(0);
    expect(device.plugged.count()).toBe(0);
  });

  test('5.15.6.8: The device MUST set the state to PLUGGED, UNPLUGGED, otherwise MIXED', () => {
    const { request } = bench(world);
    request(VIRTIO_MEM_REQ_PLUG, at(2), 2);
    const state = (first: number, n: number): MemoryAnswer => request(VIRTIO_MEM_REQ_STATE, at(first), n);
    expect(state(2, 2)).toEqual({ type: VIRTIO_MEM_RESP_ACK, state: VIRTIO_MEM_STATE_PLUGGED });
    expect(state(0, 2)).toEqual({ type: VIRTIO_MEM_RESP_ACK, state: VIRTIO_MEM_STATE_UNPLUGGED });
    expect(state(1, 2)).toEqual({ type: VIRTIO_MEM_RESP_ACK, state: VIRTIO_MEM_STATE_MIXED });
  });

  test('5.15.6.2, .4, .6, .8: The device MUST ignore the padding and anything else in a request', () => {
    const { request, plugged } = bench(world);
    expect(request(VIRTIO_MEM_REQ_PLUG, at(0), 2, 0xdeadbeef | 0).type).toBe(VIRTIO_MEM_RESP_ACK);
    expect(request(VIRTIO_MEM_REQ_UNPLUG, at(1), 1, 0xdeadbeef | 0).type).toBe(VIRTIO_MEM_RESP_ACK);
    expect(request(VIRTIO_MEM_REQ_STATE, at(0), 2, 0xdeadbeef | 0).state).toBe(VIRTIO_MEM_STATE_MIXED);
    expect(request(VIRTIO_MEM_REQ_UNPLUG_ALL, at(9), 77, 0xdeadbeef | 0).type).toBe(VIRTIO_MEM_RESP_ACK);
    expect(plugged()).not.toContain(true);
  });

  test('QEMU: a plug beyond the requested size is a NACK, judged after the range and before the blocks', () => {
    const { request } = bench(world, { requestedBytes: 2 * BLOCK });
    expect(request(VIRTIO_MEM_REQ_PLUG, at(0) + 1, 5).type).toBe(VIRTIO_MEM_RESP_ERROR);
    expect(request(VIRTIO_MEM_REQ_PLUG, at(0), 3).type).toBe(VIRTIO_MEM_RESP_NACK);
    request(VIRTIO_MEM_REQ_PLUG, at(0), 2);
    expect(request(VIRTIO_MEM_REQ_PLUG, at(0), 1).type).toBe(VIRTIO_MEM_RESP_NACK);
  });

  test('QEMU: while a migration runs what changes blocks is BUSY, after every other judgement; STATE is answered', () => {
    const { device, request } = bench(world);
    request(VIRTIO_MEM_REQ_PLUG, at(0), 1);
    device.busy = true;
    expect(request(VIRTIO_MEM_REQ_PLUG, at(0), 1).type).toBe(VIRTIO_MEM_RESP_ERROR);
    expect(request(VIRTIO_MEM_REQ_PLUG, at(1), 1).type).toBe(VIRTIO_MEM_RESP_BUSY);
    expect(request(VIRTIO_MEM_REQ_UNPLUG, at(0), 1).type).toBe(VIRTIO_MEM_RESP_BUSY);
    expect(request(VIRTIO_MEM_REQ_UNPLUG_ALL, 0, 0).type).toBe(VIRTIO_MEM_RESP_BUSY);
    expect(request(VIRTIO_MEM_REQ_STATE, at(0), 1).type).toBe(VIRTIO_MEM_RESP_ACK);
    expect(device.pluggedBytes).toBe(BLOCK);
  });

  test.each([
    ['an unknown request type', 24, 10, 4],
    ['a request buffer too short', 16, 10, 0],
    ['a response buffer too short', 24, 8, 0],
  ])('%s breaks the device, which asks for a reset', (_what, out, into, type) => {
    const { ring, transport, device, pump, driver } = bench(world);
    ring.u32(REQUEST, type);
    ring.desc(0, REQUEST, out, VIRTQ_DESC_F_NEXT, 1);
    ring.desc(1, RESPONSE, into, VIRTQ_DESC_F_WRITE);
    ring.avail(0);
    transport.write(0x50, 4, 0);
    pump();
    expect(driver.status & STATUS_DEVICE_NEEDS_RESET).not.toBe(0);
    expect(device.plugged.count()).toBe(0);
  });

  test('any sequence of requests is answered as an independent model says, and plugged_size is its population', () => {
    // Where no memory is behind it, the region is larger than what is usable of it.
    const block = world === 'a plain buffer' ? 32 * MiB : BLOCK;
    const blocks = world === 'a plain buffer' ? 32 : BLOCKS;
    const extent = (256 * MiB) / block;
    type Op = readonly [
      kind: 'plug' | 'unplug' | 'all' | 'state' | 'resize' | 'busy',
      first: number,
      n: number,
    ];
    const op: fc.Arbitrary<Op> = fc.tuple(
      fc.constantFrom('plug', 'plug', 'unplug', 'unplug', 'all', 'state', 'resize', 'busy'),
      fc.integer({ min: -1, max: blocks }),
      fc.integer({ min: 0, max: 6 }),
    );
    fc.assert(
      fc.property(fc.array(op, { maxLength: 40 }), (ops) => {
        const figures = { requestedBytes: 8 * block, blockBytes: block, regionBytes: blocks * block };
        const b = bench(world, figures);
        const model = new Set<number>();
        let requested = 8;
        const wanted = (): number => (requested === 0 ? 0 : Math.min(blocks, requested + extent));
        let usable = wanted();
        let isBusy = false;
        for (const [kind, first, n] of ops) {
          const range = Array.from({ length: n }, (_, i) => first + i);
          const valid = n > 0 && first >= 0 && first + n <= usable;
          const answer = (): number => {
            if (kind === 'all') return isBusy ? VIRTIO_MEM_RESP_BUSY : VIRTIO_MEM_RESP_ACK;
            if (!valid) return VIRTIO_MEM_RESP_ERROR;
            if (kind === 'state') return VIRTIO_MEM_RESP_ACK;
            if (kind === 'plug' && model.size + n > requested) return VIRTIO_MEM_RESP_NACK;
            if (range.some((x) => model.has(x) === (kind === 'plug'))) return VIRTIO_MEM_RESP_ERROR;
            return isBusy ? VIRTIO_MEM_RESP_BUSY : VIRTIO_MEM_RESP_ACK;
          };
          if (kind === 'resize') {
            requested = Math.max(0, first);
            b.device.setRequested(requested * block);
            usable = Math.max(usable, wanted());
          } else if (kind === 'busy') {
            isBusy = n % 2 === 1;
            b.device.busy = isBusy;
          } else {
            const type = {
              plug: VIRTIO_MEM_REQ_PLUG,
              unplug: VIRTIO_MEM_REQ_UNPLUG,
              all: VIRTIO_MEM_REQ_UNPLUG_ALL,
              state: VIRTIO_MEM_REQ_STATE,
            }[kind];
            const want = answer();
            expect(b.request(type, ADDR + first * block, n).type).toBe(want);
            if (want === VIRTIO_MEM_RESP_ACK) {
              if (kind === 'all') {
                model.clear();
                usable = wanted();
              }
              for (const x of range) {
                if (kind === 'plug') model.add(x);
                else if (kind === 'unplug') model.delete(x);
              }
            }
          }
          expect(b.plugged().flatMap((is, x) => (is ? [x] : []))).toEqual(
            [...model].toSorted((x, y) => x - y),
          );
          expect(b.device.pluggedBytes).toBe(model.size * block);
        }
      }),
      { numRuns: 30 },
    );
  });
});

describe('system reset', () => {
  test.each([
    ['virtio-1.2: all blocks are unplugged', 'virtio-1.2', '0000000000000000', REGION],
    ['rfc-2017: as many blocks as before, without holes', 'rfc-2017', '1111100000000000', 5 * BLOCK],
    ['hyper-v: each block where it was, for whoever boots next', 'hyper-v', '1100011100000000', REGION],
  ] as const)('%s', (_what, policy, blocks, requested) => {
    const { device, request, host, plugged } = bench('a VM of this host');
    request(VIRTIO_MEM_REQ_PLUG, at(0), 8);
    request(VIRTIO_MEM_REQ_UNPLUG, at(2), 3);
    host?.finish(device.systemReset(policy));
    expect(plugged().map(Number).join('')).toBe(blocks);
    expect(device.requestedBytes).toBe(requested);
    expect(device.pluggedBytes).toBe(device.plugged.count() * BLOCK);
  });
});

test('unplugging returns the frames before it is answered (H10)', () => {
  const b = bench('a VM of this host');
  b.request(VIRTIO_MEM_REQ_PLUG, at(0), 4);
  b.memory.window(at(2), 4, true);
  const before = b.host?.file.assigned ?? 0;
  b.request(VIRTIO_MEM_REQ_UNPLUG, at(0), 4);
  expect(b.host?.file.assigned).toBe(before - 1);
  expect(b.discards).toEqual([[at(0) / PAGE_SIZE, (4 * BLOCK) / PAGE_SIZE]]);
  // One answer was out when the discard was over: that of the PLUG.
  expect(b.usedAtEnd).toEqual([1]);
});

test('UNPLUG ALL that a holder refuses for one run leaves it every other (Y19)', () => {
  const held = new Set<number>();
  const b = bench('a VM of this host', {
    holder: {
      map: (first) => held.add(first) !== undefined,
      unmap: (first) => first !== at(6) / PAGE_SIZE && held.delete(first),
    },
  });
  for (const block of [0, 2, 6]) b.request(VIRTIO_MEM_REQ_PLUG, at(block), 1);
  expect(b.request(VIRTIO_MEM_REQ_UNPLUG_ALL, 0, 0).type).toBe(VIRTIO_MEM_RESP_BUSY);
  expect([[...held].toSorted((x, y) => x - y), b.device.plugged.count()]).toEqual([
    [0, 2, 6].map((block) => at(block) / PAGE_SIZE),
    3,
  ]);
});
