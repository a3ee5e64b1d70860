/**
 * The driver's side of virtio over MMIO (virtio 1.2 § 3.1.1 and § 4.2.3): bring-up, features, queues, configuration, as
 * Linux 6.12 does them. Registers are reached through two functions, so any bridge will do.
 */
import { err, ok, type Result } from '@ebb/machine';
import {
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
  MMIO_QUEUE_DESC_LOW,
  MMIO_QUEUE_DEVICE_LOW,
  MMIO_QUEUE_DRIVER_LOW,
  MMIO_QUEUE_NOTIFY,
  MMIO_QUEUE_NUM,
  MMIO_QUEUE_NUM_MAX,
  MMIO_QUEUE_READY,
  MMIO_QUEUE_SEL,
  MMIO_STATUS,
  MMIO_VERSION,
} from '../uapi/mmio.ts';
import {
  Features,
  STATUS_ACKNOWLEDGE,
  STATUS_DRIVER,
  STATUS_DRIVER_OK,
  STATUS_FAILED,
  STATUS_FEATURES_OK,
  VIRTIO_F_VERSION_1,
} from '../uapi/virtio.ts';
import type { RingAddresses } from '../uapi/virtio.ts';

/** Register access of 1, 2 or 4 bytes. */
export interface MmioBus {
  read(offset: number, width: number): number;
  write(offset: number, width: number, value: number): void;
}

/** Why a probe failed, as Linux's errno. */
export type ProbeError = 'ENODEV' | 'EINVAL' | 'ENOENT';

export class MmioDriver {
  readonly #bus: MmioBus;
  constructor(bus: MmioBus) {
    this.#bus = bus;
  }

  /** Checks magic, version and type, resets the device and acknowledges it. */
  begin(deviceId: number): Result<void, ProbeError> {
    const bus = this.#bus;
    if (bus.read(MMIO_MAGIC_VALUE, 4) !== MMIO_MAGIC || bus.read(MMIO_VERSION, 4) !== 2) return err('ENODEV');
    if (bus.read(MMIO_DEVICE_ID, 4) !== deviceId) return err('ENODEV');
    bus.write(MMIO_STATUS, 4, 0);
    this.addStatus(STATUS_ACKNOWLEDGE);
    this.addStatus(STATUS_DRIVER);
    return ok(undefined);
  }

  readFeatures(): Features {
    const bus = this.#bus;
    bus.write(MMIO_DEVICE_FEATURES_SEL, 4, 1);
    const high = bus.read(MMIO_DEVICE_FEATURES, 4);
    bus.write(MMIO_DEVICE_FEATURES_SEL, 4, 0);
    return new Features(bus.read(MMIO_DEVICE_FEATURES, 4), high);
  }

  writeFeatures(features: Features): void {
    const bus = this.#bus;
    bus.write(MMIO_DRIVER_FEATURES_SEL, 4, 1);
    bus.write(MMIO_DRIVER_FEATURES, 4, features.high);
    bus.write(MMIO_DRIVER_FEATURES_SEL, 4, 0);
    bus.write(MMIO_DRIVER_FEATURES, 4, features.low);
  }

  /** Writes FEATURES_OK and reads it back. A missing VERSION_1 is EINVAL, as in Linux. */
  acceptFeatures(features: Features): Result<void, ProbeError> {
    if (!features.has(VIRTIO_F_VERSION_1)) return this.#fail('EINVAL');
    this.addStatus(STATUS_FEATURES_OK);
    return (this.status & STATUS_FEATURES_OK) === 0 ? this.#fail('ENODEV') : ok(undefined);
  }

  /** Largest size of queue `index`; a queue that does not exist is ENOENT. */
  queueMax(index: number): Result<number, ProbeError> {
    this.#bus.write(MMIO_QUEUE_SEL, 4, index);
    const max = this.#bus.read(MMIO_QUEUE_NUM_MAX, 4);
    return max === 0 ? this.#fail('ENOENT') : ok(max);
  }

  /** Tells the device where queue `index` is and makes it ready. */
  setupQueue(index: number, size: number, rings: RingAddresses): Result<void, ProbeError> {
    const bus = this.#bus;
    bus.write(MMIO_QUEUE_SEL, 4, index);
    if (bus.read(MMIO_QUEUE_READY, 4) !== 0) return this.#fail('ENOENT');
    bus.write(MMIO_QUEUE_NUM, 4, size);
    for (const [register, at] of [
      [MMIO_QUEUE_DESC_LOW, rings.desc],
      [MMIO_QUEUE_DRIVER_LOW, rings.driver],
      [MMIO_QUEUE_DEVICE_LOW, rings.device],
    ] as const) {
      bus.write(register, 4, at % 0x1_0000_0000);
      bus.write(register + 4, 4, Math.floor(at / 0x1_0000_0000));
    }
    bus.write(MMIO_QUEUE_READY, 4, 1);
    return bus.read(MMIO_QUEUE_READY, 4) === 1 ? ok(undefined) : this.#fail('EINVAL');
  }

  driverOk(): void {
    this.addStatus(STATUS_DRIVER_OK);
  }

  get status(): number {
    return this.#bus.read(MMIO_STATUS, 4);
  }

  /** Sets status bits; never clears any. */
  addStatus(bits: number): void {
    this.#bus.write(MMIO_STATUS, 4, this.status | bits);
  }

  reset(): void {
    this.#bus.write(MMIO_STATUS, 4, 0);
  }

  kick(index: number): void {
    this.#bus.write(MMIO_QUEUE_NOTIFY, 4, index);
  }

  /** Reads and acknowledges the interrupt status. */
  takeInterrupt(): number {
    const status = this.#bus.read(MMIO_INTERRUPT_STATUS, 4);
    if (status !== 0) this.#bus.write(MMIO_INTERRUPT_ACK, 4, status);
    return status;
  }

  readConfig32(offset: number): number {
    return this.#bus.read(MMIO_CONFIG + offset, 4);
  }

  writeConfig32(offset: number, value: number): void {
    this.#bus.write(MMIO_CONFIG + offset, 4, value);
  }

  /** Reads a 64-bit field as two halves between two reads of the generation, until it stands still (§ 2.5.1). */
  readConfig64(offset: number): number {
    for (;;) {
      const before = this.#bus.read(MMIO_CONFIG_GENERATION, 4);
      const low = this.readConfig32(offset);
      const high = this.readConfig32(offset + 4);
      if (this.#bus.read(MMIO_CONFIG_GENERATION, 4) === before) return high * 0x1_0000_0000 + low;
    }
  }

  #fail(error: ProbeError): { readonly ok: false; readonly error: ProbeError } {
    this.addStatus(STATUS_FAILED);
    return err(error);
  }
}
