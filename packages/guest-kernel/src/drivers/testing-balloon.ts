/** A balloon device that does as it is told, and a guest kernel that drives it: for tests of this package. Not exported. */
import {
  MmioTransport,
  type DescriptorChain,
  type DeviceHost,
  type SplitDeviceQueue,
  type VirtioDevice,
} from '@ebb/virtio/device';
import { FlatGuestMemory, MiB, NS_PER_S } from '@ebb/machine';
import {
  Features,
  VIRTIO_BALLOON_F_STATS_VQ,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_INDIRECT_DESC,
  VIRTIO_F_VERSION_1,
} from '@ebb/virtio/uapi';
import { guestConfig, testGuest, type TestGuest } from '../testing-guest.ts';
import { LINE_BALLOON, MMIO_BASE } from './virtio-guest.ts';

export interface Seen {
  readonly queue: number;
  readonly readable: Uint8Array;
  readonly ranges: readonly [number, number][];
  /** Shadow states of the pages named, while the device holds the buffer. */
  readonly states: readonly number[];
  /** The same, just before the device answers. */
  readonly atAnswer: number[];
}

/** A balloon device that records what it is sent and answers on the next pump. */
export class Script implements VirtioDevice {
  readonly deviceId = 5;
  readonly offered: Features;
  readonly configBytes = 16;
  readonly queueMax: readonly number[] = [];
  readonly config: Int32Array = new Int32Array(4);
  readonly writes: { offset: number; value: number; driverOk: boolean }[] = [];
  readonly seen: Seen[] = [];
  readonly events: string[] = [];
  features: Features = new Features(0, 0);
  guest: TestGuest | null = null;
  holdStats = true;
  /** Runs once, before the next answer: what another CPU does meanwhile. */
  meanwhile: (() => void) | null = null;
  host: DeviceHost | null = null;
  #queues: readonly (SplitDeviceQueue | null)[] = [];
  #stats: DescriptorChain | null = null;
  #pending: { queue: number; chain: DescriptorChain; seen: Seen; pages: readonly number[] }[] = [];

  constructor(bits: readonly number[]) {
    this.offered = Features.of(...bits, VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1);
    if (this.queueMax.length === 0)
      this.queueMax = Array.from({ length: 2 + bits.filter((b) => [1, 3, 5].includes(b)).length }, () => 128);
  }
  attach(host: DeviceHost): void {
    this.host = host;
  }
  activate(queues: readonly (SplitDeviceQueue | null)[], features: Features): void {
    this.#queues = queues;
    this.features = features;
    this.events.push('DRIVER_OK');
  }
  get statsQueue(): number {
    return this.features.has(VIRTIO_BALLOON_F_STATS_VQ) ? 2 : -1;
  }
  kick(queue: number): void {
    for (
      let chain = this.#queues[queue]?.pop() ?? null;
      chain !== null;
      chain = this.#queues[queue]?.pop() ?? null
    ) {
      const readable = new Uint8Array(chain.readableBytes);
      chain.read(0, readable);
      const ranges: [number, number][] = [];
      for (let i = chain.readableSegments; i < chain.segments; i++)
        ranges.push([chain.gpas[i] / 4096, chain.lengths[i] / 4096]);
      const pages = queue < 2 ? [...new Uint32Array(readable.buffer)] : ranges.map(([pfn]) => pfn);
      this.seen.push({ queue, readable, ranges, states: pages.map((pfn) => this.state(pfn)), atAnswer: [] });
      const seen = this.seen[this.seen.length - 1];
      if (queue === this.statsQueue) this.#stats = chain;
      else this.#pending.push({ queue, chain, seen, pages });
    }
    // With EVENT_IDX a device that wants the next kick must say so.
    this.#queues[queue]?.enableKicks();
  }
  state(pfn: number): number {
    const arena = this.guest?.arena;
    return arena === undefined ? -1 : arena.w[arena.shadow + pfn];
  }
  /** Answers everything that is held. */
  pump(): void {
    if (this.#pending.length > 0) {
      this.meanwhile?.();
      this.meanwhile = null;
    }
    for (const { queue, chain, seen, pages } of this.#pending.splice(0)) {
      seen.atAnswer.push(...pages.map((pfn) => this.state(pfn)));
      this.#queues[queue]?.push(chain, 0);
      this.host?.queueInterrupt(queue);
    }
  }
  returnStats(): void {
    if (this.#stats === null) throw new Error('no stats buffer held');
    const chain = this.#stats;
    this.#stats = null;
    this.#queues[this.statsQueue]?.push(chain, 0);
    this.host?.queueInterrupt(this.statsQueue);
  }
  get idle(): boolean {
    return true;
  }
  reset(): void {
    this.#queues = [];
  }
  readConfig(offset: number): number {
    return this.config[offset >> 2];
  }
  writeConfig(offset: number, _width: number, value: number): void {
    this.writes.push({ offset, value: value >>> 0, driverOk: this.events.includes('DRIVER_OK') });
    this.config[offset >> 2] = value;
  }
  of(queue: number): Seen[] {
    return this.seen.filter((s) => s.queue === queue);
  }
}

export interface Brought {
  readonly guest: TestGuest;
  readonly device: Script;
  /** Lets virtual time pass, taking interrupts and running kernel threads. */
  readonly run: (seconds: number) => void;
}

export function bring(bits: readonly number[], poison = false, bytes: number = 128 * MiB): Brought {
  return bringDevice(new Script(bits), poison, bytes);
}

export function bringDevice(device: Script, poison = false, bytes: number = 128 * MiB): Brought {
  let transport: MmioTransport | null = null;
  const guest = testGuest(guestConfig(bytes, { balloon: true, pagePoison: poison }), {
    read: (gpa, width) => transport?.read(gpa - MMIO_BASE, width) ?? 0,
    write: (gpa, width, value) => transport?.write(gpa - MMIO_BASE, width, value),
    pump: () => device.pump(),
    // The device sees guest memory as a stranger would: one plain buffer.
    onBoot(ram, registers) {
      transport = new MmioTransport({
        device,
        memory: new FlatGuestMemory(ram),
        interrupt: () => void (registers.lines |= 1 << LINE_BALLOON),
      });
    },
  });
  device.guest = guest;
  const [kernel] = guest.kernels;
  return {
    guest,
    device,
    run(seconds) {
      const until = kernel.vcpu.clock + seconds * NS_PER_S;
      kernel.enter();
      // Interrupts raised meanwhile are taken as the handler would.
      if (guest.registers.lines !== 0 || kernel.parts.balloon.guest.interruptTaken) {
        guest.registers.lines = 0;
        kernel.parts.balloon.guest.interruptTaken = false;
        kernel.parts.balloon.interrupt();
      }
      for (let due = kernel.nextDue(); due < until; due = kernel.nextDue()) {
        kernel.vcpu.clock = Math.max(kernel.vcpu.clock, due);
        kernel.runDue(until);
      }
      kernel.vcpu.clock = until;
      kernel.leave();
    },
  };
}

export const target = (device: Script, pages: number): void => {
  device.config[0] = pages;
  device.host?.configChanged();
};
