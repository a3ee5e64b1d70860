/** The virtio-mem driver against a scripted device: what its passes do when two CPUs want something of it at once. */
import { expect, test } from 'vitest';
import { MmioTransport, type DeviceHost, type SplitDeviceQueue, type VirtioDevice } from '@ebb/virtio/device';
import { FlatGuestMemory, MiB, NS_PER_S, PAGE_SIZE } from '@ebb/machine';
import {
  EBB_MEM_F_MORE,
  EBB_MEM_REQ_MORE,
  Features,
  MEM_CFG_ADDR,
  MEM_CFG_BLOCK_SIZE,
  MEM_CFG_PLUGGED_SIZE,
  MEM_CFG_REGION_SIZE,
  MEM_CFG_REQUESTED_SIZE,
  MEM_CFG_USABLE_REGION_SIZE,
  MEM_REQ_BYTES,
  MEM_RESP_BYTES,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_VERSION_1,
  VIRTIO_ID_MEM,
  VIRTIO_MEM_REQ_PLUG,
  VIRTIO_MEM_REQ_UNPLUG,
} from '@ebb/virtio/uapi';
import { LINUX_HOTPLUG, type HotplugConfig } from '../boot.ts';
import type { GuestKernel } from '../kernel.ts';
import { guestConfig, testGuest, type TestGuest } from '../testing-guest.ts';
import { H_TOTAL_PAGES } from '../layout.ts';
import { Z_FREE, ZONE_DMA32 } from '../mm/zone.ts';
import { LINE_MEM, MMIO_BASE, MMIO_STRIDE } from './virtio-guest.ts';

const BLOCK = 2 * MiB;
/** Two memory blocks of 8 MiB. */
const BIG = 16 * MiB;

/** A device that says yes to everything, keeps its configuration, and grants one block more when asked. */
class Willing implements VirtioDevice {
  readonly deviceId = VIRTIO_ID_MEM;
  readonly configBytes = 56;
  readonly queueMax: readonly number[];
  readonly offered: Features = Features.of(EBB_MEM_F_MORE, VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1);
  readonly idle = true;
  readonly config = new DataView(new ArrayBuffer(56));
  /** Runs once, while the answer to a request for more is not yet back. */
  meanwhile: () => void = () => undefined;
  host: DeviceHost | null = null;
  #queue: SplitDeviceQueue | null = null;
  #kicked = false;
  readonly #block: number;

  constructor(requested: number, block: number = BLOCK, plugged = 0, queueMax = 128) {
    this.queueMax = [queueMax];
    this.#block = block;
    const sizes: [number, number][] = [
      [MEM_CFG_PLUGGED_SIZE, plugged],
      [MEM_CFG_BLOCK_SIZE, block],
      [MEM_CFG_ADDR, 64 * MiB],
      [MEM_CFG_REGION_SIZE, 64 * MiB],
      [MEM_CFG_USABLE_REGION_SIZE, 64 * MiB],
      [MEM_CFG_REQUESTED_SIZE, requested],
    ];
    for (const [field, bytes] of sizes) this.config.setUint32(field, bytes, true);
  }
  get plugged(): number {
    return this.config.getUint32(MEM_CFG_PLUGGED_SIZE, true);
  }
  request(bytes: number): void {
    this.config.setUint32(MEM_CFG_REQUESTED_SIZE, bytes, true);
    this.host?.configChanged();
  }
  attach(host: DeviceHost): void {
    this.host = host;
  }
  activate(queues: readonly (SplitDeviceQueue | null)[]): void {
    this.#queue = queues[0];
  }
  kick(): void {
    this.#kicked = true;
  }
  reset(): void {
    this.#queue = null;
  }
  readConfig(offset: number): number {
    return this.config.getUint32(offset, true);
  }
  writeConfig(): void {}

  pump(): void {
    if (!this.#kicked || this.#queue === null) return;
    this.#kicked = false;
    for (let chain = this.#queue.pop(); chain !== null; chain = this.#queue.pop()) {
      const bytes = new Uint8Array(MEM_REQ_BYTES);
      chain.read(0, bytes);
      const view = new DataView(bytes.buffer);
      const type = view.getUint16(0, true);
      const size = view.getUint16(16, true) * this.#block;
      if (type === VIRTIO_MEM_REQ_PLUG)
        this.config.setUint32(MEM_CFG_PLUGGED_SIZE, this.plugged + size, true);
      if (type === VIRTIO_MEM_REQ_UNPLUG)
        this.config.setUint32(MEM_CFG_PLUGGED_SIZE, this.plugged - size, true);
      if (type === EBB_MEM_REQ_MORE)
        this.request(this.config.getUint32(MEM_CFG_REQUESTED_SIZE, true) + BLOCK);
      chain.write(0, new Uint8Array(MEM_RESP_BYTES));
      this.#queue.push(chain, MEM_RESP_BYTES);
      this.host?.queueInterrupt(0);
      if (type === EBB_MEM_REQ_MORE) this.meanwhile();
    }
    this.#queue.enableKicks();
  }
}

function bring(device: Willing, over: Partial<HotplugConfig> = {}): TestGuest {
  let transport: MmioTransport | null = null;
  const base = MMIO_BASE + LINE_MEM * MMIO_STRIDE;
  const boot = (64 * MiB) / PAGE_SIZE;
  return testGuest(
    guestConfig(128 * MiB, {
      e820: [{ start: 0, end: boot }],
      nodes: [{ start: 0, end: boot }],
      maxPfn: 2 * boot,
      hotplug: { ...LINUX_HOTPLUG, devices: 1, sectionPages: 4096, memmapZone: ZONE_DMA32, ...over },
    }),
    {
      read: (gpa, width) => transport?.read(gpa - base, width) ?? 0,
      write: (gpa, width, value) => transport?.write(gpa - base, width, value),
      pump: () => device.pump(),
      onBoot(ram, registers) {
        transport = new MmioTransport({
          device,
          memory: new FlatGuestMemory(ram),
          interrupt: () => void (registers.lines |= 1 << LINE_MEM),
        });
      },
    },
  );
}

function seconds(kernel: GuestKernel, n: number): void {
  for (let i = 0; i < n; i++) {
    kernel.vcpu.clock += NS_PER_S;
    kernel.runDue(kernel.vcpu.clock);
  }
}

test('a shrink that the host asked for survives a pass of the OOM notifier, which only plugs', () => {
  const device = new Willing(32 * MiB);
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

test('a block of several memory blocks that is plugged at probe is adopted whole', () => {
  const device = new Willing(2 * BIG, BIG, 2 * BIG);
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
  const device = new Willing(BIG, BIG);
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
  const guest = bring(new Willing(32 * MiB, BLOCK, 0, 1));
  const [kernel] = guest.kernels;
  kernel.enter();
  seconds(kernel, 2);
  expect([kernel.booted, kernel.parts.mem[0].ready]).toEqual([true, false]);
});
