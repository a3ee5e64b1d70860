/**
 * The device's side of virtio over MMIO, version 2 (virtio 1.2 § 4.2): register reads and writes of any width and
 * offset, one interrupt line. Serves an Ebb guest and anybody else's alike.
 *
 * What a real driver does is survived: kicks before DRIVER_OK (the queues are polled at DRIVER_OK), features written
 * twice, unknown feature bits (FEATURES_OK does not stick), 64-bit fields as 32-bit halves.
 */
import type { DeviceMemory } from '@ebb/machine';
import {
  INTERRUPT_CONFIG_CHANGE,
  INTERRUPT_USED_BUFFER,
  MMIO_CONFIG,
  MMIO_CONFIG_GENERATION,
  MMIO_DEVICE_FEATURES,
  MMIO_DEVICE_FEATURES_SEL,
  MMIO_DEVICE_ID,
  MMIO_DRIVER_FEATURES,
  MMIO_DRIVER_FEATURES_SEL,
  MMIO_INTERRUPT_ACK,
  MMIO_INTERRUPT_STATUS,
  MMIO_MAGIC,
  MMIO_MAGIC_VALUE,
  MMIO_QUEUE_DESC_HIGH,
  MMIO_QUEUE_DESC_LOW,
  MMIO_QUEUE_DEVICE_HIGH,
  MMIO_QUEUE_DEVICE_LOW,
  MMIO_QUEUE_DRIVER_HIGH,
  MMIO_QUEUE_DRIVER_LOW,
  MMIO_QUEUE_NOTIFY,
  MMIO_QUEUE_NUM,
  MMIO_QUEUE_NUM_MAX,
  MMIO_QUEUE_READY,
  MMIO_QUEUE_SEL,
  MMIO_SHM_BASE_HIGH,
  MMIO_SHM_LEN_LOW,
  MMIO_STATUS,
  MMIO_VENDOR_ID,
  MMIO_VERSION,
} from '../uapi/mmio.ts';
import {
  Features,
  STATUS_DEVICE_NEEDS_RESET,
  STATUS_DRIVER_OK,
  STATUS_FEATURES_OK,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_INDIRECT_DESC,
  VIRTIO_F_NOTIFICATION_DATA,
  VIRTIO_F_VERSION_1,
} from '../uapi/virtio.ts';
import { SplitDeviceQueue } from './split-device-queue.ts';
import type { DeviceHost, VirtioDevice } from './virtio-device.ts';

/** 'Ebb!' — no registered vendor. */
const VENDOR_ID = 0x21626245;

interface QueueRegisters {
  size: number;
  ready: boolean;
  desc: [low: number, high: number];
  driver: [low: number, high: number];
  device: [low: number, high: number];
}

/** Counts of what a driver did wrong; each is answered as the spec says and otherwise harmless. */
export interface TransportCounters {
  kicks: number;
  kicksForMissingQueue: number;
  badAccesses: number;
  rejectedWrites: number;
  needsReset: number;
}

export interface MmioTransportOptions {
  readonly device: VirtioDevice;
  readonly memory: DeviceMemory;
  /** Raises the interrupt line. */
  readonly interrupt: () => void;
  /** A buffer is about to be returned whose virtual completion time is `at`, whether or not the driver wants an interrupt. */
  readonly completed?: (at: number) => void;
  /** A device model touched a buffer it no longer holds. */
  readonly onLeaseBroken?: (gpa: number) => void;
}

export class MmioTransport implements DeviceHost {
  readonly device: VirtioDevice;
  readonly counters: TransportCounters = {
    kicks: 0,
    kicksForMissingQueue: 0,
    badAccesses: 0,
    rejectedWrites: 0,
    needsReset: 0,
  };
  /** Why the device asked for a reset; empty while it has not. */
  brokenBecause = '';
  readonly #memory: DeviceMemory;
  readonly #interrupt: () => void;
  readonly #completed: (at: number) => void;
  readonly #onLeaseBroken: (gpa: number) => void;
  #status = 0;
  #deviceFeaturesSel = 0;
  #driverFeaturesSel = 0;
  #driverFeatures: [number, number] = [0, 0];
  #queueSel = 0;
  #interruptStatus = 0;
  #generation = 0;
  #registers: QueueRegisters[] = [];
  #queues: (SplitDeviceQueue | null)[] = [];

  constructor(options: MmioTransportOptions) {
    this.device = options.device;
    this.#memory = options.memory;
    this.#interrupt = options.interrupt;
    this.#completed = options.completed ?? (() => undefined);
    this.#onLeaseBroken = options.onLeaseBroken ?? (() => undefined);
    this.#clearRegisters();
    options.device.attach(this);
  }

  get status(): number {
    return this.#status;
  }
  /** The live queues, null where none is ready; empty before DRIVER_OK. */
  get queues(): readonly (SplitDeviceQueue | null)[] {
    return this.#queues;
  }
  get negotiated(): Features {
    return new Features(this.#driverFeatures[0], this.#driverFeatures[1]);
  }

  // ── Registers ────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Reads `width` bytes (1, 2 or 4) at register `offset`. Anything odd reads as 0 and is counted. */
  read(offset: number, width: number): number {
    if (offset >= MMIO_CONFIG) {
      const at = offset - MMIO_CONFIG;
      if (
        (width !== 1 && width !== 2 && width !== 4) ||
        at % width !== 0 ||
        at + width > this.device.configBytes
      ) {
        return this.#bad();
      }
      return this.device.readConfig(at, width, this.negotiated) >>> 0;
    }
    if (width !== 4 || offset % 4 !== 0 || offset < 0) return this.#bad();
    const queue = this.#selected();
    switch (offset) {
      case MMIO_MAGIC_VALUE:
        return MMIO_MAGIC;
      case MMIO_VERSION:
        return 2;
      case MMIO_DEVICE_ID:
        return this.device.deviceId;
      case MMIO_VENDOR_ID:
        return VENDOR_ID;
      case MMIO_DEVICE_FEATURES:
        if (this.#deviceFeaturesSel > 1) return 0;
        return this.#deviceFeaturesSel === 0 ? this.device.offered.low : this.device.offered.high;
      case MMIO_QUEUE_NUM_MAX:
        return this.device.queueMax[this.#queueSel] ?? 0;
      case MMIO_QUEUE_READY:
        return queue?.ready === true ? 1 : 0;
      case MMIO_INTERRUPT_STATUS:
        return this.#interruptStatus;
      case MMIO_STATUS:
        return this.#status;
      case MMIO_CONFIG_GENERATION:
        return this.#generation;
      default:
        // No shared memory regions: length and base read as all ones (§ 4.2.2).
        if (offset >= MMIO_SHM_LEN_LOW && offset <= MMIO_SHM_BASE_HIGH) return 0xffffffff;
        return this.#bad();
    }
  }

  /** Writes register `offset`. What a driver may not write is ignored and counted. */
  write(offset: number, width: number, value: number): void {
    if (offset >= MMIO_CONFIG) {
      const at = offset - MMIO_CONFIG;
      if (
        (width !== 1 && width !== 2 && width !== 4) ||
        at % width !== 0 ||
        at + width > this.device.configBytes
      ) {
        this.#bad();
        return;
      }
      this.device.writeConfig(at, width, value, this.negotiated);
      return;
    }
    if (width !== 4 || offset % 4 !== 0 || offset < 0) {
      this.#bad();
      return;
    }
    switch (offset) {
      case MMIO_DEVICE_FEATURES_SEL:
        this.#deviceFeaturesSel = value >>> 0;
        return;
      case MMIO_DRIVER_FEATURES_SEL:
        this.#driverFeaturesSel = value >>> 0;
        return;
      case MMIO_DRIVER_FEATURES:
        if ((this.#status & STATUS_FEATURES_OK) !== 0) this.counters.rejectedWrites++;
        else if (this.#driverFeaturesSel < 2) this.#driverFeatures[this.#driverFeaturesSel] = value >>> 0;
        else if (value !== 0) this.counters.rejectedWrites++;
        return;
      case MMIO_QUEUE_SEL:
        this.#queueSel = value >>> 0;
        return;
      case MMIO_QUEUE_NOTIFY:
        this.#notify(value);
        return;
      case MMIO_INTERRUPT_ACK:
        this.#interruptStatus &= ~value;
        return;
      case MMIO_STATUS:
        this.#writeStatus(value & 0xff);
        return;
      default:
        this.#writeQueueRegister(offset, value);
    }
  }

  /**
   * Whether a write is to be held back: a reset, or a queue that is taken away, is over only when nothing the device took
   * is still being carried out. Queues yield nothing from the first time this is asked. A bus that cannot hold a write
   * back need not ask: the device then touches nothing of the driver's after the reset, but may finish what it began.
   */
  mustWait(offset: number, width: number, value: number): boolean {
    if (width !== 4) return false;
    if (offset === MMIO_STATUS && (value & 0xff) === 0) for (const queue of this.#queues) queue?.stop();
    else if (offset === MMIO_QUEUE_READY && (value & 1) === 0) this.#queues[this.#queueSel]?.stop();
    else return false;
    return !this.device.idle;
  }

  #writeQueueRegister(offset: number, value: number): void {
    const queue = this.#selected();
    if (queue === undefined || (queue.ready && offset !== MMIO_QUEUE_READY)) {
      this.counters.rejectedWrites++;
      return;
    }
    switch (offset) {
      case MMIO_QUEUE_NUM:
        queue.size = value >>> 0;
        return;
      case MMIO_QUEUE_READY:
        this.#setReady(queue, (value & 1) === 1);
        return;
      case MMIO_QUEUE_DESC_LOW:
        queue.desc[0] = value >>> 0;
        return;
      case MMIO_QUEUE_DESC_HIGH:
        queue.desc[1] = value >>> 0;
        return;
      case MMIO_QUEUE_DRIVER_LOW:
        queue.driver[0] = value >>> 0;
        return;
      case MMIO_QUEUE_DRIVER_HIGH:
        queue.driver[1] = value >>> 0;
        return;
      case MMIO_QUEUE_DEVICE_LOW:
        queue.device[0] = value >>> 0;
        return;
      case MMIO_QUEUE_DEVICE_HIGH:
        queue.device[1] = value >>> 0;
        return;
      default:
        this.counters.rejectedWrites++;
    }
  }

  /**
   * A queue becomes ready only with a legal size and aligned rings (§ 2.7: 16, 2 and 4), and before DRIVER_OK (§ 3.1.1): one
   * that was taken away from a live device stays away until the reset.
   */
  #setReady(queue: QueueRegisters, ready: boolean): void {
    if (!ready) {
      queue.ready = false;
      this.#queues[this.#queueSel]?.stop();
      return;
    }
    const max = this.device.queueMax[this.#queueSel] ?? 0;
    if (
      (this.#status & STATUS_DRIVER_OK) !== 0 ||
      !SplitDeviceQueue.validSize(queue.size, max) ||
      queue.desc[0] % 16 !== 0 ||
      queue.driver[0] % 2 !== 0 ||
      queue.device[0] % 4 !== 0
    ) {
      this.counters.rejectedWrites++;
      return;
    }
    queue.ready = true;
  }

  #notify(value: number): void {
    // With NOTIFICATION_DATA the upper half carries the ring position (§ 2.9).
    const index = this.negotiated.has(VIRTIO_F_NOTIFICATION_DATA) ? value & 0xffff : value >>> 0;
    this.counters.kicks++;
    if ((this.#status & STATUS_DRIVER_OK) === 0) return;
    const queue = this.#queues[index];
    if (queue === undefined || queue === null) {
      this.counters.kicksForMissingQueue++;
      return;
    }
    if ((this.#status & STATUS_DEVICE_NEEDS_RESET) === 0) this.device.kick(index);
  }

  #writeStatus(value: number): void {
    if (value === 0) {
      this.reset();
      return;
    }
    // A driver must not clear bits: those it leaves out stay set (§ 2.1.1).
    let added = value & ~this.#status & ~STATUS_DEVICE_NEEDS_RESET;
    if ((added & STATUS_FEATURES_OK) !== 0) {
      const features = this.negotiated;
      if (!features.within(this.device.offered) || !features.has(VIRTIO_F_VERSION_1))
        added &= ~STATUS_FEATURES_OK;
    }
    if ((added & STATUS_DRIVER_OK) !== 0 && ((this.#status | added) & STATUS_FEATURES_OK) === 0) {
      added &= ~STATUS_DRIVER_OK;
      this.counters.rejectedWrites++;
    }
    this.#status |= added;
    if ((added & STATUS_DRIVER_OK) !== 0) this.#activate();
  }

  #activate(): void {
    const features = this.negotiated;
    this.#queues = this.#registers.map((queue) =>
      queue.ready
        ? new SplitDeviceQueue({
            size: queue.size,
            rings: {
              desc: queue.desc[1] * 0x1_0000_0000 + queue.desc[0],
              driver: queue.driver[1] * 0x1_0000_0000 + queue.driver[0],
              device: queue.device[1] * 0x1_0000_0000 + queue.device[0],
            },
            memory: this.#memory,
            eventIdx: features.has(VIRTIO_F_EVENT_IDX),
            indirect: features.has(VIRTIO_F_INDIRECT_DESC),
            onLeaseBroken: this.#onLeaseBroken,
          })
        : null,
    );
    this.device.activate(this.#queues, features);
    // Linux kicks the stats queue before DRIVER_OK: what waits there is served now.
    this.#queues.forEach((queue, index) => {
      if (queue?.hasAvail() === true) this.device.kick(index);
    });
  }

  /** Device reset: status 0, all registers initial, the device forgets its queues. */
  reset(): void {
    this.#status = 0;
    this.#clearRegisters();
    for (const queue of this.#queues) queue?.stop();
    this.#queues = [];
    this.device.reset();
  }

  #clearRegisters(): void {
    this.#deviceFeaturesSel = 0;
    this.#driverFeaturesSel = 0;
    this.#driverFeatures = [0, 0];
    this.#queueSel = 0;
    this.#interruptStatus = 0;
    this.brokenBecause = '';
    this.#registers = this.device.queueMax.map(() => ({
      size: 0,
      ready: false,
      desc: [0, 0],
      driver: [0, 0],
      device: [0, 0],
    }));
  }

  #selected(): QueueRegisters | undefined {
    return this.#registers[this.#queueSel];
  }

  #bad(): number {
    this.counters.badAccesses++;
    return 0;
  }

  // ── DeviceHost ───────────────────────────────────────────────────────────────────────────────────────────────────

  completes(at: number): void {
    this.#completed(at);
  }

  queueInterrupt(index: number): void {
    const queue = this.#queues[index];
    if (queue === undefined || queue === null || !queue.needsInterrupt()) return;
    this.#interruptStatus |= INTERRUPT_USED_BUFFER;
    this.#interrupt();
  }

  configMoved(): void {
    this.#generation = (this.#generation + 1) >>> 0;
  }

  configChanged(): void {
    this.configMoved();
    if ((this.#status & STATUS_DRIVER_OK) === 0) return;
    this.#interruptStatus |= INTERRUPT_CONFIG_CHANGE;
    this.#interrupt();
  }

  needsReset(why: string): void {
    if ((this.#status & STATUS_DEVICE_NEEDS_RESET) !== 0) return;
    this.counters.needsReset++;
    this.brokenBecause = why;
    this.#status |= STATUS_DEVICE_NEEDS_RESET;
    if ((this.#status & STATUS_DRIVER_OK) === 0) return;
    this.#interruptStatus |= INTERRUPT_CONFIG_CHANGE;
    this.#interrupt();
  }
}
