/** A memory device that does as it is told, and a guest kernel that drives it: for tests of this package. Not exported. */
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
  VIRTIO_MEM_REQ_UNPLUG_ALL,
  VIRTIO_MEM_RESP_ACK,
} from '@ebb/virtio/uapi';
import { LINUX_HOTPLUG, type HotplugConfig } from '../boot.ts';
import type { GuestKernel } from '../kernel.ts';
import { guestConfig, testGuest, type TestGuest } from '../testing-guest.ts';
import { ZONE_DMA32 } from '../mm/zone.ts';
import { LINE_MEM, MMIO_BASE, MMIO_STRIDE } from './virtio-guest.ts';

export const BLOCK: number = 2 * MiB;
/** Boot memory ends and the region begins. */
export const REGION_ADDR: number = 64 * MiB;
const REGION_BYTES: number = 64 * MiB;

/** One request as the device saw it; pages of the region in blocks. */
export interface SeenRequest {
  readonly type: number;
  readonly block: number;
  readonly count: number;
  readonly answer: number;
}

/** Says yes to everything but what `answer` says, keeps its configuration, and grants one block more when asked. */
export class ScriptedMemory implements VirtioDevice {
  readonly deviceId: number = VIRTIO_ID_MEM;
  readonly configBytes = 56;
  readonly queueMax: readonly number[];
  offered: Features = Features.of(EBB_MEM_F_MORE, VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1);
  readonly idle = true;
  readonly config: DataView = new DataView(new ArrayBuffer(56));
  /** The answer to a request: an ACK if nothing else is set. */
  answer: (type: number) => number = () => VIRTIO_MEM_RESP_ACK;
  readonly seen: SeenRequest[] = [];
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
      [MEM_CFG_ADDR, REGION_ADDR],
      [MEM_CFG_REGION_SIZE, REGION_BYTES],
      [MEM_CFG_USABLE_REGION_SIZE, REGION_BYTES],
      [MEM_CFG_REQUESTED_SIZE, requested],
    ];
    for (const [field, bytes] of sizes) this.config.setUint32(field, bytes, true);
  }
  get plugged(): number {
    return this.config.getUint32(MEM_CFG_PLUGGED_SIZE, true);
  }
  /** The host asks for a size. */
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

  #carryOut(type: number, size: number): void {
    const set = (field: number, bytes: number): void => this.config.setUint32(field, bytes, true);
    if (type === VIRTIO_MEM_REQ_PLUG) set(MEM_CFG_PLUGGED_SIZE, this.plugged + size);
    if (type === VIRTIO_MEM_REQ_UNPLUG) set(MEM_CFG_PLUGGED_SIZE, this.plugged - size);
    if (type === VIRTIO_MEM_REQ_UNPLUG_ALL) set(MEM_CFG_PLUGGED_SIZE, 0);
    if (type === EBB_MEM_REQ_MORE) this.request(this.config.getUint32(MEM_CFG_REQUESTED_SIZE, true) + BLOCK);
  }

  pump(): void {
    if (!this.#kicked || this.#queue === null) return;
    this.#kicked = false;
    for (let chain = this.#queue.pop(); chain !== null; chain = this.#queue.pop()) {
      const bytes = new Uint8Array(MEM_REQ_BYTES);
      chain.read(0, bytes);
      const view = new DataView(bytes.buffer);
      const type = view.getUint16(0, true);
      const count = view.getUint16(16, true);
      const block = (view.getUint32(8, true) - REGION_ADDR) / this.#block;
      const answer = this.answer(type);
      this.seen.push({ type, block, count, answer });
      if (answer === VIRTIO_MEM_RESP_ACK) this.#carryOut(type, count * this.#block);
      const bytesOut = new Uint8Array(MEM_RESP_BYTES);
      bytesOut[0] = answer;
      chain.write(0, bytesOut);
      this.#queue.push(chain, MEM_RESP_BYTES);
      this.host?.queueInterrupt(0);
      if (type === EBB_MEM_REQ_MORE) this.meanwhile();
    }
    this.#queue.enableKicks();
  }
}

/** A guest with 64 MiB of boot memory and the device; memory blocks of 16 MiB unless `over` says else. */
export function bring(
  device: ScriptedMemory,
  over: Partial<HotplugConfig> = {},
  initOnAlloc = true,
): TestGuest {
  let transport: MmioTransport | null = null;
  const base = MMIO_BASE + LINE_MEM * MMIO_STRIDE;
  const boot = REGION_ADDR / PAGE_SIZE;
  return testGuest(
    guestConfig(REGION_ADDR + REGION_BYTES, {
      e820: [{ start: 0, end: boot }],
      nodes: [{ start: 0, end: boot }],
      initOnAlloc,
      maxPfn: boot + REGION_BYTES / PAGE_SIZE,
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

/** Time passes, second by second, and whatever is due is done. */
export function seconds(kernel: GuestKernel, n: number): void {
  for (let i = 0; i < n; i++) {
    kernel.vcpu.clock += NS_PER_S;
    kernel.runDue(kernel.vcpu.clock);
  }
}
