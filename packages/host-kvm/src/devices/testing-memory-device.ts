/** A memory device on a bench, and its smallest guest, which sends one request at a time. For tests. Not exported. */
import {
  COST_TABLE,
  FlatGuestMemory,
  inlineSchedule,
  MiB,
  PAGE_SIZE,
  type DeviceMemory,
  type GuestMemory,
} from '@ebb/machine';
import { MmioTransport } from '@ebb/virtio/device';
import { MmioDriver } from '@ebb/virtio/driver';
import { RawRing } from '@ebb/virtio/testing';
import {
  EBB_MEM_F_EXCHANGE,
  EBB_MEM_F_MORE,
  EBB_MEM_REQ_TO_OFFSET,
  Features,
  MEM_REQ_BYTES,
  MEM_RESP_BYTES,
  MMIO_QUEUE_NOTIFY,
  VIRTIO_F_VERSION_1,
  VIRTIO_ID_MEM,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
} from '@ebb/virtio/uapi';
import { HostTasks, type TaskYield } from '../host-tasks.ts';
import { testHost, type TestHost } from '../kvm/testing-host.ts';
import { MemoryDevice, type MemoryDeviceOptions } from './memory-device.ts';

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
  /** Sends one request and returns the answer. `padding` fills every padding field; `to` is the block an exchange takes. */
  readonly request: (
    type: number,
    addr: number,
    nrBlocks: number,
    padding?: number,
    to?: number,
  ) => MemoryAnswer;
}

/** `pump`: lets the device work until it is done. Rings and buffers lie between 1 and 3 MiB of `memory`. */
export function memoryGuest(device: MemoryDevice, memory: DeviceMemory, pump: () => void): MemoryGuest {
  const transport = new MmioTransport({ device, memory, interrupt: () => undefined });
  const driver = new MmioDriver(transport);
  const ring = new RawRing(memory, 64, RINGS);
  driver.begin(VIRTIO_ID_MEM);
  const features = Features.of(VIRTIO_F_VERSION_1, EBB_MEM_F_MORE, EBB_MEM_F_EXCHANGE).and(device.offered);
  driver.writeFeatures(features);
  driver.acceptFeatures(features);
  driver.setupQueue(0, 64, RINGS);
  driver.driverOk();
  return {
    transport,
    driver,
    ring,
    request(type, addr, nrBlocks, padding = 0, to = padding) {
      for (let at = 0; at < MEM_REQ_BYTES; at += 4) ring.u32(REQUEST + at, padding);
      ring.u16(REQUEST, type);
      ring.u32(REQUEST + 8, (addr % 2 ** 32) | 0);
      ring.u32(REQUEST + 12, Math.floor(addr / 2 ** 32));
      ring.u16(REQUEST + 16, nrBlocks);
      ring.u32(REQUEST + EBB_MEM_REQ_TO_OFFSET, to);
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

export const ADDR: number = 32 * MiB;
export const REGION: number = 16 * MiB;
export const BLOCK: number = 1 * MiB;
export const BLOCKS: number = REGION / BLOCK;
export const worlds = ['a VM of this host', 'a plain buffer'] as const;
export type World = (typeof worlds)[number];

export interface Bench extends MemoryGuest {
  readonly memory: GuestMemory;
  readonly device: MemoryDevice;
  readonly host: TestHost | null;
  readonly discards: [number, number][];
  /** The queue's used index at the end of each discard. */
  readonly usedAtEnd: number[];
  /** Lets the device work. */
  readonly pump: () => void;
  readonly plugged: () => boolean[];
}

/** A memory device of 16 MiB at 32 MiB, its guest, and the host if there is one. */
export function bench(world: World, over: Partial<MemoryDeviceOptions> = {}): Bench {
  const host = world === 'a VM of this host' ? testHost({ hostBytes: 96 * MiB, ramBytes: 48 * MiB }) : null;
  const tasks = host?.tasks ?? new HostTasks(inlineSchedule);
  const memory = host?.vm.memory ?? new FlatGuestMemory(new ArrayBuffer(48 * MiB));
  const discards: [number, number][] = [];
  const usedAtEnd: number[] = [];
  const device = new MemoryDevice({
    port: { spawn: (name, body) => void tasks.spawn(name, body), now: () => 0, costs: COST_TABLE },
    region: {
      pageBytes: PAGE_SIZE,
      *discard(first: number, count: number): Generator<TaskYield, number, void> {
        discards.push([first, count]);
        yield undefined;
        const freed = host === null ? count : yield* host.vm.discard(Int32Array.of(first, count), 1);
        usedAtEnd.push(guest.ring.usedIdx);
        return freed;
      },
      *unmap(first: number, count: number): Generator<TaskYield, void, void> {
        if (host !== null) yield* host.vm.unmap(first, count);
      },
    },
    id: 'vm0',
    addr: ADDR,
    regionBytes: REGION,
    blockBytes: BLOCK,
    node: 3,
    requestedBytes: REGION,
    ...over,
  });
  host?.vm.addGate(device.unplugged);
  const pump = (): void => {
    while (host === null ? tasks.step() : host.poll());
  };
  const guest = memoryGuest(device, memory, pump);
  return {
    ...guest,
    pump,
    memory,
    device,
    host,
    discards,
    usedAtEnd,
    plugged: () => Array.from({ length: device.plugged.length }, (_, b) => device.plugged.has(b)),
  };
}

/** Address of a block. */
export const at = (block: number): number => ADDR + block * BLOCK;
