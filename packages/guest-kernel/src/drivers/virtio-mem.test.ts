/** The virtio-mem driver against a scripted device: what its passes do when two CPUs want something of it at once. */
import { expect, test, vi } from 'vitest';
import { MiB, PAGE_SIZE } from '@ebb/machine';
import {
  EBB_MEM_F_EXCHANGE,
  EBB_MEM_REQ_EXCHANGE,
  Features,
  MEM_CFG_NODE_ID,
  MEM_CFG_REQUESTED_SIZE,
  VIRTIO_MEM_F_ACPI_PXM,
  VIRTIO_MEM_REQ_PLUG,
  VIRTIO_MEM_REQ_UNPLUG,
  VIRTIO_MEM_RESP_ACK,
  VIRTIO_MEM_RESP_BUSY,
  VIRTIO_MEM_RESP_ERROR,
  VIRTIO_MEM_RESP_NACK,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_VERSION_1,
} from '@ebb/virtio/uapi';
import { H_TOTAL_PAGES } from '../layout.ts';
import { SHADOW_ABSENT } from '../mm/page.ts';
import { Z_FREE } from '../mm/zone.ts';
import { BLOCK, bring, ScriptedMemory, seconds } from './testing-memory-device.ts';
import { LINE_MEM } from './virtio-guest.ts';

/** Two memory blocks of 8 MiB. */
const BIG = 16 * MiB;

test('a shrink that the host asked for survives a pass of the OOM notifier, which only plugs', () => {
  const device = new ScriptedMemory(32 * MiB);
  const guest = bring(device);
  const [a, b] = guest.kernels;
  const [driver] = a.parts.mem;
  a.enter();
  seconds(a, 5);
  expect(device.plugged).toBe(32 * MiB);
  // The host wants 8 MiB. vCPU 0 hears of it while vCPU 1, out of memory, waits for its answer with the mutex held.
  device.config.setUint32(MEM_CFG_REQUESTED_SIZE, 8 * MiB, true);
  device.meanwhile = () => {
    driver.interrupt();
    driver.work();
    guest.registers.lines |= 1 << LINE_MEM;
  };
  b.enter();
  b.parts.mem[0].oomNotify();
  b.leave();
  guest.registers.lines = 0;
  driver.guest.interruptTaken = false;
  seconds(a, 5);
  expect(device.plugged).toBe(10 * MiB);
  a.leave();
});

test('the module is not removed while a vCPU waits for the device (`cancel_work_sync`)', () => {
  const device = new ScriptedMemory(8 * MiB);
  const guest = bring(device);
  const [a, b] = guest.kernels;
  const [driver] = a.parts.mem;
  a.enter();
  seconds(a, 2);
  const waits = vi.spyOn(a.vcpu.port, 'relax').mockImplementation(() => {
    throw new Error('waits for the mutex');
  });
  device.meanwhile = () => {
    expect(() => driver.remove()).toThrow('waits for the mutex');
    expect(driver.ready).toBe(true);
  };
  b.enter();
  expect(b.parts.mem[0].oomNotify()).toBeGreaterThan(0);
  b.leave();
  waits.mockRestore();
  driver.remove();
  expect(driver.ready).toBe(false);
  expect(b.parts.mem[0].oomNotify()).toBe(0);
  a.leave();
});

test('a driver that comes back uses what is plugged then, not what the one before had plugged (I20)', () => {
  const device = new ScriptedMemory(0);
  const guest = bring(device);
  const [kernel] = guest.kernels;
  const [driver] = kernel.parts.mem;
  kernel.enter();
  seconds(kernel, 2);
  // A block is plugged, there is no memory for its memmap, and the device will not have it back.
  device.answer = (type) => (type === VIRTIO_MEM_REQ_UNPLUG ? VIRTIO_MEM_RESP_BUSY : VIRTIO_MEM_RESP_ACK);
  kernel.parts.alloc.failNext = 2;
  device.request(BIG);
  driver.interrupt();
  seconds(kernel, 1);
  kernel.parts.alloc.failNext = 0;
  expect(device.plugged).toBe(BIG);
  driver.remove();
  device.answer = () => VIRTIO_MEM_RESP_ACK;
  device.request(2 * BLOCK);
  expect(driver.reload()).toBe(true);
  seconds(kernel, 2);
  const first = (64 * MiB) / PAGE_SIZE;
  const { w, shadow } = guest.arena;
  const used = w
    .subarray(shadow + first, shadow + first + BIG / PAGE_SIZE)
    .filter((s) => s !== SHADOW_ABSENT);
  expect([device.plugged, used.length * PAGE_SIZE]).toEqual([2 * BLOCK, 2 * BLOCK]);
  kernel.leave();
});

test.each([
  ['NACK to an unplug', VIRTIO_MEM_REQ_UNPLUG, VIRTIO_MEM_RESP_NACK],
  ['ERROR to a plug', VIRTIO_MEM_REQ_PLUG, VIRTIO_MEM_RESP_ERROR],
])('after an answer that makes no sense (%s) the driver asks for nothing more', (_what, type, answer) => {
  const device = new ScriptedMemory(type === VIRTIO_MEM_REQ_PLUG ? 0 : BIG);
  const guest = bring(device);
  const [kernel] = guest.kernels;
  const [driver] = kernel.parts.mem;
  kernel.enter();
  seconds(kernel, 2);
  device.answer = (asked) => (asked === type ? answer : VIRTIO_MEM_RESP_ACK);
  const before = device.seen.length;
  for (const bytes of [8 * MiB, 4 * MiB, 12 * MiB]) {
    device.request(bytes);
    driver.interrupt();
    seconds(kernel, 2);
  }
  expect(device.seen.slice(before).map((r) => [r.type, r.answer])).toEqual([[type, answer]]);
  kernel.leave();
});

test('memory on a node that the guest does not have is used all the same', () => {
  const device = new ScriptedMemory(32 * MiB);
  device.offered = Features.of(VIRTIO_MEM_F_ACPI_PXM, VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1);
  device.config.setUint16(MEM_CFG_NODE_ID, 7, true);
  const guest = bring(device);
  const [kernel] = guest.kernels;
  kernel.enter();
  seconds(kernel, 3);
  expect(device.plugged).toBe(32 * MiB);
  kernel.leave();
});

test('a block of several memory blocks that is plugged at probe is adopted whole', () => {
  const device = new ScriptedMemory(2 * BIG, BIG, 2 * BIG);
  const guest = bring(device, { sectionPages: 2048, adopts: 'adds' });
  const [kernel] = guest.kernels;
  const total = guest.arena.w[H_TOTAL_PAGES];
  kernel.enter();
  device.request(0);
  kernel.parts.mem[0].interrupt();
  seconds(kernel, 5);
  // All of it was in use, and all of it can be given back.
  expect([device.plugged, total - guest.arena.w[H_TOTAL_PAGES]]).toEqual([0, (2 * BIG) / PAGE_SIZE]);
  expect(guest.log.total).toBe(0);
});

test('a big block of which one memory block cannot go stays in use, all of it', () => {
  const device = new ScriptedMemory(BIG, BIG);
  const guest = bring(device, { sectionPages: 2048 });
  const [kernel] = guest.kernels;
  const { alloc, pcp, zones, mem } = kernel.parts;
  const free = (): number => {
    pcp.drainAll(2);
    return zones.reduce((sum, z) => sum + guest.arena.w[z + Z_FREE], 0);
  };
  kernel.enter();
  seconds(kernel, 5);
  expect(device.plugged).toBe(BIG);
  // Somebody holds a page of the second of its two memory blocks.
  expect(alloc.allocExactly((64 * MiB) / PAGE_SIZE + 2048 + 7)).toBe(true);
  const before = free();
  device.request(0);
  mem[0].interrupt();
  seconds(kernel, 5);
  expect([device.plugged, free()]).toEqual([BIG, before]);
});

test('a queue too short for a request is no device: the guest does without, and waits for nothing', () => {
  const guest = bring(new ScriptedMemory(32 * MiB, BLOCK, 0, 1));
  const [kernel] = guest.kernels;
  kernel.enter();
  seconds(kernel, 2);
  expect([kernel.booted, kernel.parts.mem[0].ready]).toEqual([true, false]);
});

test('blocks are traded within a kind of zone only (H44)', () => {
  const device = new ScriptedMemory(0);
  device.offered = Features.of(EBB_MEM_F_EXCHANGE, VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1);
  // Memory blocks of 8 MiB: one is Movable, as much as 15 % of 64 MiB allow, then one is not.
  const guest = bring(device, { sectionPages: 2048, policy: 'auto-movable', autoMovableRatio: 15 });
  const [kernel] = guest.kernels;
  const { alloc, mem } = kernel.parts;
  const resize = (bytes: number): void => {
    device.request(bytes);
    mem[0].interrupt();
    seconds(kernel, 2);
  };
  kernel.enter();
  resize(16 * MiB);
  const pins = [0, 1].map((block) => (64 * MiB + block * 8 * MiB) / PAGE_SIZE + 512 + 7);
  for (const pfn of pins) expect(alloc.allocExactly(pfn)).toBe(true);
  resize(2 * BLOCK);
  expect(device.plugged).toBe(2 * BLOCK);
  for (const pfn of pins) alloc.free(pfn, 0);
  seconds(kernel, 120);
  // Each holds one sub-block, and neither could give it to one of its kind.
  expect(device.seen.filter((r) => r.type === EBB_MEM_REQ_EXCHANGE)).toEqual([]);
});
