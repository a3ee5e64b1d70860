/**
 * What the guest's virtio drivers share: registers by MMIO exits, queues with their state in the arena and their rings
 * in guest pages, and the wait for a device.
 */
import { assert, type Vcpu } from '@ebb/machine';
import { MmioDriver, SplitDriverQueue, type MmioBus } from '@ebb/virtio/driver';
import type { Features } from '@ebb/virtio/uapi';
import { VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC } from '@ebb/virtio/uapi';
import type { Arena } from '../arena.ts';
import { CPU_BASE, CPU_LINES_TAKEN, CPU_WORDS, MAX_MEM_DEVICES, QUEUE_WORDS } from '../layout.ts';

/** Guest-physical base of device registers: far above RAM; device `n` is at `+ n · 4 KiB` and has interrupt line `n`. */
export const MMIO_BASE = 0xfd_0000_0000;
export const MMIO_STRIDE = 0x1000;
export const LINE_BALLOON = 0;
export const LINE_BLK = 1;
/** First of the memory devices' lines. */
export const LINE_MEM = 2;

/** The line of ACPI's general-purpose events, and where the registers of memory slots are. */
export const LINE_ACPI: number = LINE_MEM + MAX_MEM_DEVICES;

/** Queue numbers in the arena. */
export const Q_INFLATE = 0;
export const Q_DEFLATE = 1;
export const Q_STATS = 2;
export const Q_HINT = 3;
export const Q_REPORTING = 4;
export const Q_BLK = 5;
/** First of the memory devices' queues. */
export const Q_MEM = 6;

/** Ranges in one report (`PAGE_REPORTING_CAPACITY`). */
export const PAGE_REPORTING_CAPACITY = 32;

export class VirtioGuest {
  readonly line: number;
  readonly driver: MmioDriver;
  readonly vcpu: Vcpu;
  readonly #arena: Arena;
  /** Word of the lines taken. */
  readonly #taken: number;
  /** Runs inside every wait: sections are begun by the wait itself; this serves requests of sibling CPUs. */
  readonly #inWait: () => void;

  constructor(arena: Arena, vcpu: Vcpu, line: number, inWait: () => void) {
    this.line = line;
    this.vcpu = vcpu;
    this.#arena = arena;
    this.#taken = CPU_BASE + vcpu.id * CPU_WORDS + CPU_LINES_TAKEN;
    this.#inWait = inWait;
    const base = MMIO_BASE + line * MMIO_STRIDE;
    const bus: MmioBus = {
      read: (offset, width) => vcpu.mmioRead(base + offset, width) >>> 0,
      write: (offset, width, value) => vcpu.mmioWrite(base + offset, width, value),
    };
    this.driver = new MmioDriver(bus);
  }

  /** A wait took the line's bit: the driver's interrupt handler must run for whatever else it announced. This CPU's. */
  get interruptTaken(): boolean {
    return (this.#arena.w[this.#taken] & (1 << this.line)) !== 0;
  }
  set interruptTaken(taken: boolean) {
    const { w } = this.#arena;
    if (taken) w[this.#taken] |= 1 << this.line;
    else w[this.#taken] &= ~(1 << this.line);
  }

  /** Bring-up to FEATURES_OK with what the device offers of `wanted`; null: no such device, or it does not agree. */
  negotiate(deviceId: number, wanted: Features): Features | null {
    const { driver } = this;
    if (!driver.begin(deviceId).ok) return null;
    const features = driver.readFeatures().and(wanted);
    driver.writeFeatures(features);
    return driver.acceptFeatures(features).ok ? features : null;
  }

  /** A view of queue `number`, whose rings are the three pages from the arena's record at `ringWord`. */
  queue(number: number, size: number, ringWord: number, features: Features): SplitDriverQueue {
    const w = this.#arena.w;
    return new SplitDriverQueue({
      size,
      rings: { desc: w[ringWord] * 4096, driver: w[ringWord + 1] * 4096, device: w[ringWord + 2] * 4096 },
      state: w,
      stateBase: this.#arena.layout.queues + number * QUEUE_WORDS,
      eventIdx: features.has(VIRTIO_F_EVENT_IDX),
      indirect: features.has(VIRTIO_F_INDIRECT_DESC),
    });
  }

  /**
   * Publishes what was added, kicks if the device wants it, and waits until `queue` returns a buffer: its token. Holds
   * no spin lock. The vCPU halts outside guest mode between looks; the time until the completion is due is a stall.
   */
  submitAndWait(queue: SplitDriverQueue, deviceQueue: number): number {
    this.submit(queue, deviceQueue);
    const token = this.waitUsed(queue);
    this.settle();
    return token;
  }

  /** Publishes what was added and kicks if the device wants it. */
  submit(queue: SplitDriverQueue, deviceQueue: number): void {
    this.vcpu.schedule.point('index-publish', deviceQueue);
    if (queue.publish(this.vcpu)) this.#kick(deviceQueue);
  }

  /** Adds and publishes `count` buffers of `descriptors` each, through tables at `tables`, and kicks if the device wants it. */
  submitTables(
    queue: SplitDriverQueue,
    deviceQueue: number,
    tables: Float64Array,
    tokens: Int32Array,
    count: number,
    descriptors: number,
  ): void {
    this.vcpu.schedule.point('index-publish', deviceQueue);
    const added = queue.addTables(this.vcpu, tables, tokens, count, descriptors);
    assert(added === count, 'a batch is no larger than the queue');
    if (queue.needsKick(this.vcpu)) this.#kick(deviceQueue);
  }

  #kick(deviceQueue: number): void {
    this.vcpu.schedule.point('doorbell', deviceQueue);
    this.driver.kick(deviceQueue);
  }

  /** Waits for the next returned buffer of `queue`: its token. */
  waitUsed(queue: SplitDriverQueue): number {
    const vcpu = this.vcpu;
    for (;;) {
      const pending = vcpu.clearInterrupt(this.line);
      this.interruptTaken = true;
      if (queue.enableInterrupts(vcpu)) {
        const token = queue.popUsed(vcpu);
        assert(!queue.broken, 'our device keeps the ring rules');
        if (token >= 0) return token;
      }
      this.#inWait();
      vcpu.halt(pending);
    }
  }

  /** Charges the time until the device's newest completion is due. */
  settle(): void {
    this.vcpu.stall(this.vcpu.completionDue(this.line) - this.vcpu.clock);
  }
}
