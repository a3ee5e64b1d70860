/** The disk's driver against a scripted device: what it sends, and what it believes of the answers. */
import { expect, test } from 'vitest';
import { FlatGuestMemory, MiB } from '@ebb/machine';
import { MmioTransport, type SplitDeviceQueue, type VirtioDevice } from '@ebb/virtio/device';
import {
  Features,
  MMIO_INTERRUPT_STATUS,
  VIRTIO_BLK_F_FLUSH,
  VIRTIO_BLK_S_IOERR,
  VIRTIO_BLK_S_OK,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_INDIRECT_DESC,
  VIRTIO_F_VERSION_1,
  VIRTIO_ID_BLOCK,
} from '@ebb/virtio/uapi';
import { guestConfig, testGuest } from '../testing-guest.ts';
import { LINE_BLK, MMIO_BASE, MMIO_STRIDE } from './virtio-guest.ts';

/** In place of a status: the device writes none. */
const NONE = -1;

/** A disk that stores nothing: it answers each request with the status that is next, and OK when none is left. */
function disk() {
  const statuses: number[] = [];
  const sectors: number[] = [];
  let queue: SplitDeviceQueue | null = null;
  let transport: MmioTransport | null = null;
  let interrupt: () => void = () => undefined;
  const device: VirtioDevice = {
    deviceId: VIRTIO_ID_BLOCK,
    offered: Features.of(VIRTIO_BLK_F_FLUSH, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1),
    configBytes: 8,
    queueMax: [256],
    idle: true,
    attach: (host) => {
      interrupt = () => host.queueInterrupt(0);
    },
    activate: (queues) => {
      queue = queues[0] ?? null;
    },
    kick: () => undefined,
    reset: () => undefined,
    readConfig: () => 0,
    writeConfig: () => undefined,
  };
  const base = MMIO_BASE + LINE_BLK * MMIO_STRIDE;
  const serve = (): void => {
    for (let chain = queue?.pop(); chain; chain = queue?.pop()) {
      const header = new Uint8Array(16);
      chain.read(0, header);
      sectors.push(Number(new DataView(header.buffer).getBigUint64(8, true)));
      const status = statuses.shift() ?? VIRTIO_BLK_S_OK;
      if (status !== NONE) chain.write(chain.writableBytes - 1, Uint8Array.of(status));
      queue?.push(chain, chain.writableBytes);
      interrupt();
    }
    queue?.enableKicks();
  };
  const guest = testGuest(guestConfig(64 * MiB, { blk: true }), {
    read: (gpa, width) => (gpa >= base ? (transport?.read(gpa - base, width) ?? 0) : 0),
    write: (gpa, width, value) => void (gpa >= base && transport?.write(gpa - base, width, value)),
    pump: serve,
    onBoot(ram, registers) {
      transport = new MmioTransport({
        device,
        memory: new FlatGuestMemory(ram),
        interrupt: () => void (registers.lines |= 1 << LINE_BLK),
      });
    },
  });
  const [kernel] = guest.kernels;
  kernel.enter();
  const page = kernel.parts.alloc.alloc(0, 1, 3);
  const transfer = (count: number, block = 0): boolean =>
    kernel.parts.blk.transfer(
      true,
      new Int32Array(count).fill(page),
      Float64Array.from({ length: count }, (_, i) => block + i),
      count,
    );
  return { transfer, statuses, sectors, status: () => transport?.read(MMIO_INTERRUPT_STATUS, 4) };
}

test('a request that fails fails the transfer, wherever among the others it is, in whichever batch', () => {
  const { transfer, statuses } = disk();
  expect(transfer(70)).toBe(true);
  for (const bad of [0, 1, 31, 32, 69]) {
    statuses.push(
      ...Array.from({ length: 70 }, (_, i) => (i === bad ? VIRTIO_BLK_S_IOERR : VIRTIO_BLK_S_OK)),
    );
    expect(transfer(70)).toBe(false);
  }
  expect(transfer(70)).toBe(true);
});

test('a request that comes back without a status has failed', () => {
  const { transfer, statuses } = disk();
  statuses.push(NONE);
  expect([transfer(1), transfer(1)]).toEqual([false, true]);
});

test('sectors are 64 bits: blocks beyond 2 TiB are those', () => {
  const { transfer, sectors } = disk();
  sectors.length = 0;
  transfer(1, 2 ** 31);
  expect(sectors).toEqual([2 ** 34]);
});

test('After the interrupt is handled, the driver MUST acknowledge it', () => {
  const { transfer, status } = disk();
  transfer(3);
  expect(status()).toBe(0);
});
