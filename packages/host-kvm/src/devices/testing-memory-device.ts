/** The smallest guest of a memory device: brings it up and sends one request at a time. For tests. Not exported. */
import type { DeviceMemory } from '@ebb/machine';
import { MmioTransport } from '@ebb/virtio/device';
import { MmioDriver } from '@ebb/virtio/driver';
import { RawRing } from '@ebb/virtio/testing';
import {
  EBB_MEM_F_MORE,
  Features,
  MEM_REQ_BYTES,
  MEM_RESP_BYTES,
  MMIO_QUEUE_NOTIFY,
  VIRTIO_F_VERSION_1,
  VIRTIO_ID_MEM,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
} from '@ebb/virtio/uapi';
import type { MemoryDevice } from './memory-device.ts';

const RINGS = { desc: 0x100000, driver: 0x101000, device: 0x102000 } as const;
export const REQUEST = 0x200000;
export const RESPONSE = 0x201000;

export interface MemoryAnswer {
  readonly type: number;
  readonly state: number;
}

export interface MemoryGuest {
  readonly transport: MmioTransport;
  readonly driver: MmioDriver;
  readonly ring: RawRing;
  /** Sends one request and returns the answer. `padding` fills every padding field. */
  readonly request: (type: number, addr: number, nrBlocks: number, padding?: number) => MemoryAnswer;
}

/** `pump`: lets the device work until it is done. Rings and buffers lie between 1 and 3 MiB of `memory`. */
export function memoryGuest(device: MemoryDevice, memory: DeviceMemory, pump: () => void): MemoryGuest {
  const transport = new MmioTransport({ device, memory, interrupt: () => undefined });
  const driver = new MmioDriver(transport);
  const ring = new RawRing(memory, 64, RINGS);
  driver.begin(VIRTIO_ID_MEM);
  const features = Features.of(VIRTIO_F_VERSION_1, EBB_MEM_F_MORE).and(device.offered);
  driver.writeFeatures(features);
  driver.acceptFeatures(features);
  driver.setupQueue(0, 64, RINGS);
  driver.driverOk();
  return {
    transport,
    driver,
    ring,
    request(type, addr, nrBlocks, padding = 0) {
      for (let at = 0; at < MEM_REQ_BYTES; at += 4) ring.u32(REQUEST + at, padding);
      ring.u16(REQUEST, type);
      ring.u32(REQUEST + 8, (addr % 2 ** 32) | 0);
      ring.u32(REQUEST + 12, Math.floor(addr / 2 ** 32));
      ring.u16(REQUEST + 16, nrBlocks);
      for (let at = 0; at < 12; at += 4) ring.u32(RESPONSE + at, 0x5a5a5a5a);
      ring.desc(0, REQUEST, MEM_REQ_BYTES, VIRTQ_DESC_F_NEXT, 1);
      ring.desc(1, RESPONSE, MEM_RESP_BYTES, VIRTQ_DESC_F_WRITE);
      ring.avail(0);
      transport.write(MMIO_QUEUE_NOTIFY, 4, 0);
      pump();
      return { type: ring.readU16(RESPONSE), state: ring.readU16(RESPONSE + 8) };
    },
  };
}
