/** What a device model is to its transport. It never learns who its guest is. */
import type { Features } from '../uapi/virtio.ts';
import type { SplitDeviceQueue } from './split-device-queue.ts';

/** How a device model reaches its transport: interrupts, and the sticky error. */
export interface DeviceHost {
  /** What is pushed next completes at virtual time `at`, in ns. Before the push: a driver may see the buffer at once. */
  completes(at: number): void;
  /** Buffers of queue `index` were pushed: interrupt if the driver asked for it. */
  queueInterrupt(index: number): void;
  /** Configuration changed by itself: bump the generation and interrupt. */
  configChanged(): void;
  /** Configuration changed as the driver asked: bump the generation. */
  configMoved(): void;
  /** The guest broke a queue: set DEVICE_NEEDS_RESET and tell the driver (§ 2.1.2). */
  needsReset(why: string): void;
}

export interface VirtioDevice {
  readonly deviceId: number;
  readonly offered: Features;
  /** Bytes of configuration space. */
  readonly configBytes: number;
  /** Largest size of each queue by index; an index beyond has no queue. */
  readonly queueMax: readonly number[];
  /** The transport introduces itself once. */
  attach(host: DeviceHost): void;
  /** DRIVER_OK: queues by index (null where the driver made none ready). Buffers made available before wait in them. */
  activate(queues: readonly (SplitDeviceQueue | null)[], features: Features): void;
  /** A kick for a live queue. */
  kick(index: number): void;
  /** Nothing that was taken from a queue is still being carried out. */
  readonly idle: boolean;
  /** Device reset: forget queues and in-flight buffers; touch nothing of the guest's any more. */
  reset(): void;
  /** Little-endian read of `width` bytes (1, 2, 4) inside the configuration space. */
  readConfig(offset: number, width: number, features: Features): number;
  /** A write inside the configuration space; read-only fields ignore it. */
  writeConfig(offset: number, width: number, value: number, features: Features): void;
}
