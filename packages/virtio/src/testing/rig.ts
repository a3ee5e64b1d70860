/** A device, its transport and a driver over one plain buffer: the smallest whole virtio system, for tests. */
import { FlatGuestMemory, type DeviceMemory } from '@ebb/machine';
import { MmioTransport, type DeviceHost, type SplitDeviceQueue, type VirtioDevice } from '../device/index.ts';
import { MmioDriver, SplitDriverQueue, driverQueueWords, type MmioBus } from '../driver/index.ts';
import {
  Features,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_INDIRECT_DESC,
  VIRTIO_F_VERSION_1,
  type RingAddresses,
} from '../uapi/index.ts';

export const RINGS: RingAddresses = { desc: 0x10000, driver: 0x11000, device: 0x12000 };
export const QUEUE_SIZE = 64;

/** A device of type 42 with one queue and a 16-byte configuration whose first word is writable. */
export class ProbeDevice implements VirtioDevice {
  readonly deviceId: number = 42;
  readonly offered: Features;
  readonly configBytes: number = 16;
  readonly queueMax: readonly number[];
  readonly config: Uint8Array = new Uint8Array(16);
  queue: SplitDeviceQueue | null = null;
  features: Features = new Features(0, 0);
  kicks: number[] = [];
  resets = 0;
  host: DeviceHost | null = null;

  constructor(
    bits: readonly number[] = [VIRTIO_F_INDIRECT_DESC, VIRTIO_F_EVENT_IDX],
    queueMax: readonly number[] = [QUEUE_SIZE],
  ) {
    this.offered = Features.of(...bits, VIRTIO_F_VERSION_1);
    this.queueMax = queueMax;
  }
  attach(host: DeviceHost): void {
    this.host = host;
  }
  activate(queues: readonly (SplitDeviceQueue | null)[], features: Features): void {
    this.queue = queues[0] ?? null;
    this.features = features;
  }
  kick(index: number): void {
    this.kicks.push(index);
  }
  get idle(): boolean {
    return true;
  }
  reset(): void {
    this.resets++;
    this.queue = null;
  }
  readConfig(offset: number, width: number): number {
    let value = 0;
    for (let i = 0; i < width; i++) value += this.config[offset + i] * 2 ** (8 * i);
    return value;
  }
  writeConfig(offset: number, width: number, value: number): void {
    if (offset === 0 && width === 4) new DataView(this.config.buffer).setUint32(0, value, true);
  }
}

export interface Rig {
  readonly memory: DeviceMemory;
  readonly device: ProbeDevice;
  readonly transport: MmioTransport;
  readonly driver: MmioDriver;
  readonly queue: SplitDriverQueue;
  /** Register accesses in order: `R 0x070/4` or `W 0x070/4=1`. */
  readonly log: string[];
  readonly interrupts: { count: number };
}

/** Builds the system; `bringUp` false leaves the device in reset. */
export function rig(
  options: {
    bits?: readonly number[];
    driverBits?: readonly number[];
    bringUp?: boolean;
    memory?: DeviceMemory;
    size?: number;
    rings?: RingAddresses;
  } = {},
): Rig {
  const memory = options.memory ?? new FlatGuestMemory(new ArrayBuffer(1 << 20));
  const device = new ProbeDevice(options.bits);
  const interrupts = { count: 0 };
  const transport = new MmioTransport({ device, memory, interrupt: () => void interrupts.count++ });
  const log: string[] = [];
  const bus: MmioBus = {
    read(offset, width) {
      log.push(`R 0x${offset.toString(16).padStart(3, '0')}/${width}`);
      return transport.read(offset, width);
    },
    write(offset, width, value) {
      log.push(`W 0x${offset.toString(16).padStart(3, '0')}/${width}=${value}`);
      transport.write(offset, width, value);
    },
  };
  const driver = new MmioDriver(bus);
  const size = options.size ?? QUEUE_SIZE;
  const rings = options.rings ?? RINGS;
  const features =
    options.driverBits === undefined
      ? device.offered
      : Features.of(...options.driverBits, VIRTIO_F_VERSION_1);
  const queue = new SplitDriverQueue({
    size,
    rings,
    state: new Int32Array(driverQueueWords(size)),
    stateBase: 0,
    eventIdx: features.has(VIRTIO_F_EVENT_IDX),
    indirect: features.has(VIRTIO_F_INDIRECT_DESC),
  });
  if (options.bringUp !== false) {
    driver.begin(42);
    driver.writeFeatures(driver.readFeatures().and(features));
    driver.acceptFeatures(features);
    queue.reset(memory);
    driver.queueMax(0);
    driver.setupQueue(0, size, rings);
    driver.driverOk();
  }
  return { memory, device, transport, driver, queue, log, interrupts };
}
