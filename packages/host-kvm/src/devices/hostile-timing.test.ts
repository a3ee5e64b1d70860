/** Devices and a guest that acts at the worst moment: resets in the middle, endless buffers, a host without frames. */
import { expect, test } from 'vitest';
import { COST_TABLE, gfn, MiB, PAGE_SIZE } from '@ebb/machine';
import { MemFile } from '@ebb/memfs';
import { MmioTransport, type VirtioDevice } from '@ebb/virtio/device';
import { MmioDriver } from '@ebb/virtio/driver';
import { RawRing } from '@ebb/virtio/testing';
import {
  Features,
  MMIO_CONFIG_GENERATION,
  MMIO_QUEUE_READY,
  MMIO_QUEUE_SEL,
  MMIO_STATUS,
  VIRTIO_BLK_S_IOERR,
  VIRTIO_BLK_S_OK,
  VIRTIO_F_VERSION_1,
  VIRTIO_MEM_REQ_PLUG,
  VIRTIO_MEM_REQ_UNPLUG,
  VIRTIO_MEM_REQ_UNPLUG_ALL,
  VIRTIO_MEM_RESP_BUSY,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
} from '@ebb/virtio/uapi';
import { testHost, type TestHost } from '../kvm/testing-host.ts';
import { BalloonDevice } from './balloon.ts';
import { BlockDevice, type BlockStorage } from './block.ts';
import type { DevicePort } from './device-port.ts';
import { MemoryDevice, type PageHolder } from './memory-device.ts';
import { wholeRegion } from './region.ts';
import type { MemoryProfile } from './unplugged-memory.ts';
import { virtioRegion } from './virtio-mmio.ts';

const BASE = 0xfd_0000_0000;
const BUFFER = 0x200000;
const INFLATE = 0;
const DEFLATE = 1;
const STATS = 2;
const HINT = 3;
const REPORT = 4;

const ringsOf = (q: number) => ({
  desc: 0x100000 + q * 0x3000,
  driver: 0x101000 + q * 0x3000,
  device: 0x102000 + q * 0x3000,
});

interface Attached {
  readonly transport: MmioTransport;
  readonly driver: MmioDriver;
  /** Rings as a guest writes them, one per queue. */
  readonly rings: readonly RawRing[];
}

/** Puts `device` behind registers of the VM and brings it up with `bits` and every queue it has. */
function attach(
  host: TestHost,
  device: VirtioDevice,
  bits: readonly number[] = [0, 1, 2, 3, 4, 5],
  completed: (at: number) => void = () => undefined,
): Attached {
  const { memory } = host.vm;
  const transport = new MmioTransport({ device, memory, interrupt: () => undefined, completed });
  host.vm.addMmio(virtioRegion(BASE, transport));
  const driver = new MmioDriver(transport);
  driver.begin(device.deviceId);
  const features = Features.of(...bits, VIRTIO_F_VERSION_1).and(device.offered);
  driver.writeFeatures(features);
  driver.acceptFeatures(features);
  const rings = device.queueMax.map((_, q) => {
    driver.setupQueue(q, 64, ringsOf(q));
    const ring = new RawRing(memory, 64, ringsOf(q));
    // Rings are in use, so their pages have frames.
    ring.usedEvent(0);
    void ring.usedIdx;
    return ring;
  });
  driver.driverOk();
  return { transport, driver, rings };
}

const portOf = (host: TestHost): DevicePort => ({
  spawn: (name, body) => void host.tasks.spawn(name, body),
  now: () => 0,
  costs: COST_TABLE,
});

function balloonOn(host: TestHost, endPfn = 4096): BalloonDevice {
  return new BalloonDevice({
    port: portOf(host),
    memory: { ramPages: 4096, endPfn, unitPages: 1, discard: (runs, n) => host.vm.discard(runs, n) },
  });
}

const small = (): TestHost => testHost({ ramBytes: 16 * MiB, huge: 'never' });
const settle = (host: TestHost): void => {
  while (host.poll());
};

/** From now on the other vCPU publishes one more buffer whenever the device looks at queue `q`'s index. */
function endless(host: TestHost, q: number): { looks: number } {
  const { memory } = host.vm;
  const window = memory.window.bind(memory);
  const count = { looks: 1 };
  memory.window = (gpa, length, write) => {
    const found = window(gpa, length, write);
    if (gpa === ringsOf(q).driver + 2) {
      if (++count.looks > 50_000) throw new Error('the host serves one guest for ever');
      memory.u16[memory.at >> 1] = count.looks & 0xffff;
    }
    return found;
  };
  return count;
}

// ── A guest that does not stop ───────────────────────────────────────────────────────────────────────────────────

test('a guest that adds deflate buffers as fast as they are taken does not hold the host', () => {
  const host = small();
  const { driver, rings } = attach(host, balloonOn(host));
  rings[DEFLATE].u32(BUFFER, 600);
  rings[DEFLATE].desc(0, BUFFER, 4, 0);
  rings[DEFLATE].avail(0);
  const count = endless(host, DEFLATE);
  driver.kick(DEFLATE);
  for (let i = 0; i < 10; i++) host.tasks.step();
  expect(count.looks).toBeLessThan(5000);
});

test('a long inflate buffer with nothing to discard in it does not hold the host', () => {
  const host = small();
  const { memory } = host.vm;
  const { driver, rings } = attach(host, balloonOn(host));
  // The same MiB of PFNs beyond any RAM, eight times.
  for (let gpa = 4 * MiB; gpa < 5 * MiB; gpa += PAGE_SIZE) {
    memory.window(gpa, PAGE_SIZE, true);
    memory.i32.fill(-1, memory.at >> 2, (memory.at + PAGE_SIZE) >> 2);
  }
  for (let d = 0; d < 8; d++) rings[INFLATE].desc(d, 4 * MiB, MiB, d < 7 ? VIRTQ_DESC_F_NEXT : 0, d + 1);
  rings[INFLATE].avail(0);
  let turns = 0;
  host.tasks.spawn(
    'company',
    (function* () {
      for (;;) {
        turns++;
        yield undefined;
      }
    })(),
  );
  driver.kick(INFLATE);
  while (rings[INFLATE].usedIdx === 0) host.tasks.step();
  expect(turns).toBeGreaterThanOrEqual(8);
});

test('a guest that adds disk requests as fast as they are taken does not hold the host', () => {
  const host = small();
  const disk = { bytes: MiB, read: () => undefined, write: () => undefined, flush: () => undefined };
  const { driver, rings } = attach(host, new BlockDevice(disk, portOf(host)));
  rings[0].u32(BUFFER, 4);
  rings[0].desc(0, BUFFER, 16, VIRTQ_DESC_F_NEXT, 1);
  rings[0].desc(1, BUFFER + 64, 1, VIRTQ_DESC_F_WRITE);
  rings[0].avail(0);
  settle(host);
  const count = endless(host, 0);
  driver.kick(0);
  for (let i = 0; i < 10; i++) host.tasks.step();
  expect(count.looks).toBeLessThan(5000);
});

// ── Resets in the middle ─────────────────────────────────────────────────────────────────────────────────────────

test('a reset is over only when what the device has taken is: nothing is discarded after it', () => {
  const host = small();
  const [v0, v1] = host.vcpus;
  v1.enterGuest();
  v1.store32(gfn(2000), 0, 1);
  v0.enterGuest();
  v0.store32(gfn(1000), 0, 0xaaaa);
  const { rings } = attach(host, balloonOn(host));
  rings[INFLATE].u32(BUFFER, 1000);
  rings[INFLATE].desc(0, BUFFER, 4, 0);
  rings[INFLATE].avail(0);
  // Somebody else's invalidation holds the MMU lock until v1 acknowledges; v1 leaves guest mode when asked for the 50th time.
  let left = 50;
  host.tasks.spawn('other', host.vm.unmap(2000, 1));
  host.tasks.spawn(
    'v1',
    (function* () {
      while (--left > 0) yield undefined;
      v1.leaveGuest();
    })(),
  );
  for (let i = 0; i < 5; i++) host.poll();
  v0.mmioWrite(BASE + 0x50, 4, INFLATE);
  v0.mmioWrite(BASE + MMIO_STATUS, 4, 0);
  expect(v0.mmioRead(BASE + MMIO_STATUS, 4)).toBe(0);
  v0.store32(gfn(1000), 0, 0xbbbb);
  v0.leaveGuest();
  settle(host);
  v0.enterGuest();
  expect(v0.load32(gfn(1000), 0)).toBe(0xbbbb);
});

test('QueueReady 0 stops the queue: MUST NOT access virtual queue contents when QueueReady is zero', () => {
  const host = small();
  const { driver, transport, rings } = attach(host, balloonOn(host));
  transport.write(MMIO_QUEUE_SEL, 4, DEFLATE);
  transport.write(MMIO_QUEUE_READY, 4, 0);
  expect(transport.read(MMIO_QUEUE_READY, 4)).toBe(0);
  rings[DEFLATE].u32(BUFFER, 600);
  rings[DEFLATE].desc(0, BUFFER, 4, 0);
  rings[DEFLATE].avail(0);
  driver.kick(DEFLATE);
  settle(host);
  expect(rings[DEFLATE].usedIdx).toBe(0);
});

test('the completion time of a buffer is known before the buffer is', () => {
  const host = small();
  const seen: number[] = [];
  const rings: RawRing[] = [];
  const attached = attach(host, balloonOn(host), [0, 1, 2, 3, 4, 5], () => seen.push(rings[DEFLATE].usedIdx));
  rings.push(...attached.rings);
  rings[DEFLATE].u32(BUFFER, 600);
  rings[DEFLATE].desc(0, BUFFER, 4, 0);
  rings[DEFLATE].avail(0);
  attached.driver.kick(DEFLATE);
  settle(host);
  expect(seen).toEqual([0]);
  expect(rings[DEFLATE].usedIdx).toBe(1);
});

// ── Buffers nobody has touched ───────────────────────────────────────────────────────────────────────────────────

test('reporting memory that was never touched takes no frame', () => {
  const host = small();
  const device = balloonOn(host);
  const { driver, rings } = attach(host, device);
  rings[REPORT].desc(0, 4 * MiB, 2 * MiB, VIRTQ_DESC_F_WRITE);
  rings[REPORT].avail(0);
  const before = host.file.assigned;
  driver.kick(REPORT);
  settle(host);
  expect(rings[REPORT].usedIdx).toBe(1);
  expect([host.file.assigned - before, device.counters.discardedPages]).toEqual([0, 0]);
});

test('hinting memory that was never touched takes no frame', () => {
  const host = small();
  const device = balloonOn(host);
  const { driver, rings } = attach(host, device);
  expect(device.startHinting()).toBe(true);
  rings[HINT].u32(BUFFER, device.hintCommandId | 0);
  rings[HINT].desc(0, BUFFER, 4, 0);
  rings[HINT].desc(1, 4 * MiB, 4 * MiB, VIRTQ_DESC_F_WRITE);
  rings[HINT].avail(0);
  rings[HINT].avail(1);
  const before = host.file.assigned;
  driver.kick(HINT);
  settle(host);
  expect([device.counters.hintedPages, host.file.assigned - before]).toEqual([1024, 0]);
});

test('a report is served when the host has no frame left, which is when it is wanted', () => {
  const host = small();
  const { driver, transport, rings } = attach(host, balloonOn(host));
  rings[REPORT].desc(0, 4 * MiB, 2 * MiB, VIRTQ_DESC_F_WRITE);
  rings[REPORT].avail(0);
  while (host.pool.chargeVmm(0, 1));
  driver.kick(REPORT);
  settle(host);
  expect([transport.brokenBecause, rings[REPORT].usedIdx]).toEqual(['', 1]);
});

// ── Balloon ──────────────────────────────────────────────────────────────────────────────────────────────────────

test('a run of inflated pages that crosses from one slot into the next is given back whole', () => {
  const host = small();
  const next = new MemFile({ name: 'b', nrBlocks: 512, vm: 0, frames: host.pool, huge: 'never' });
  const region = {
    slot: 1,
    flags: 0,
    guestPhysAddr: 16 * MiB,
    memorySize: 2 * MiB,
    file: next,
    fileOffset: 0,
  };
  host.finish(host.vm.setUserMemoryRegion(region));
  const [vcpu] = host.vcpus;
  vcpu.enterGuest();
  vcpu.store32(gfn(4095), 0, 1);
  vcpu.store32(gfn(4096), 0, 1);
  vcpu.leaveGuest();
  const { driver, rings } = attach(host, balloonOn(host, 4096 + 512));
  rings[INFLATE].u32(BUFFER, 4095);
  rings[INFLATE].u32(BUFFER + 4, 4096);
  rings[INFLATE].desc(0, BUFFER, 8, 0);
  rings[INFLATE].avail(0);
  driver.kick(INFLATE);
  settle(host);
  expect([rings[INFLATE].usedIdx, host.file.bmap(4095), next.bmap(0)]).toEqual([1, -1, -1]);
});

test('an inflated page of a region far above boot memory is given back', () => {
  const host = small();
  const first = 0x10_0000 + 4096;
  const far = new MemFile({ name: 'b', nrBlocks: 512, vm: 0, frames: host.pool, huge: 'never' });
  const region = {
    slot: 1,
    flags: 0,
    guestPhysAddr: first * PAGE_SIZE,
    memorySize: 2 * MiB,
    file: far,
    fileOffset: 0,
  };
  host.finish(host.vm.setUserMemoryRegion(region));
  const [vcpu] = host.vcpus;
  vcpu.enterGuest();
  vcpu.store32(gfn(first + 8), 0, 1);
  vcpu.leaveGuest();
  const device = balloonOn(host, first + 512);
  const { driver, rings } = attach(host, device);
  rings[INFLATE].u32(BUFFER, first + 8);
  rings[INFLATE].desc(0, BUFFER, 4, 0);
  rings[INFLATE].avail(0);
  driver.kick(INFLATE);
  settle(host);
  expect([device.counters.badPfns, far.bmap(8)]).toEqual([0, -1]);
});

test('PFNs that lie where there is no RAM are not page 0', () => {
  const host = small();
  const [vcpu] = host.vcpus;
  vcpu.enterGuest();
  vcpu.store32(gfn(0), 0, 77);
  vcpu.leaveGuest();
  // The first and the last page of the buffer are RAM, what lies between is not.
  const last = new MemFile({ name: 'b', nrBlocks: 512, vm: 0, frames: host.pool, huge: 'never' });
  const region = {
    slot: 1,
    flags: 0,
    guestPhysAddr: 18 * MiB,
    memorySize: 2 * MiB,
    file: last,
    fileOffset: 0,
  };
  host.finish(host.vm.setUserMemoryRegion(region));
  const { driver, rings } = attach(host, balloonOn(host));
  for (let i = 0; i < 1024; i++) rings[INFLATE].u32(16 * MiB - PAGE_SIZE + 4 * i, 700 + i);
  rings[INFLATE].desc(0, 16 * MiB - PAGE_SIZE, 2 * MiB + 2 * PAGE_SIZE, 0);
  rings[INFLATE].avail(0);
  driver.kick(INFLATE);
  settle(host);
  expect(rings[INFLATE].usedIdx).toBe(1);
  expect(host.file.bmap(0)).toBeGreaterThanOrEqual(0);
});

test('a round of hinting that never began ends with an empty bitmap', () => {
  const host = small();
  const device = balloonOn(host);
  attach(host, device, [0, 1]);
  expect(device.startHinting()).toBe(false);
  expect(device.stopHinting().count()).toBe(0);
});

test('a second statistics buffer sends the first one back', () => {
  const host = small();
  const device = balloonOn(host);
  const { driver, rings } = attach(host, device);
  for (const at of [0, 1]) {
    rings[STATS].desc(at, BUFFER + 64 * at, 10, 0);
    rings[STATS].avail(at);
    driver.kick(STATS);
    settle(host);
  }
  expect(rings[STATS].usedIdx).toBe(1);
  expect([device.requestStats(), device.requestStats()]).toEqual([true, false]);
  expect(rings[STATS].usedIdx).toBe(2);
});

// ── Disk ─────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Sends one request of `type` at `sector` with `bytes` of data at 4 MiB; status, length used. */
function diskRequest(
  host: TestHost,
  storage: BlockStorage,
  sector: number,
  bytes: number,
  before: () => void = () => undefined,
): { status: number; used: number; ring: RawRing } {
  const { driver, rings } = attach(host, new BlockDevice(storage, portOf(host)));
  const [ring] = rings;
  ring.u32(BUFFER, 0);
  ring.u32(BUFFER + 8, sector);
  ring.u32(BUFFER + 64, 0xff);
  ring.u32(4 * MiB, 0x1111);
  ring.u32(4 * MiB + bytes - PAGE_SIZE, 0x1111);
  ring.desc(0, BUFFER, 16, VIRTQ_DESC_F_NEXT, 1);
  ring.desc(1, 4 * MiB, bytes, VIRTQ_DESC_F_NEXT | VIRTQ_DESC_F_WRITE, 2);
  ring.desc(2, BUFFER + 64, 1, VIRTQ_DESC_F_WRITE);
  ring.avail(0);
  before();
  driver.kick(0);
  settle(host);
  return { status: ring.readU32(BUFFER + 64) & 0xff, used: ring.used(0).length, ring };
}

test('a disk read whose buffer the host has no frames for is an I/O error, and says how much was written', () => {
  const host = small();
  const disk = {
    bytes: MiB,
    read: (_offset: number, out: Uint8Array) => void out.fill(7),
    write: () => undefined,
    flush: () => undefined,
  };
  // First and last page are backed, the one between has no frame to be had.
  const { status, used } = diskRequest(host, disk, 0, 3 * PAGE_SIZE, () => {
    while (host.pool.chargeVmm(0, 1));
  });
  expect({ status, used }).toEqual({ status: VIRTIO_BLK_S_IOERR, used: PAGE_SIZE });
});

test('a failed disk read claims no byte that was not written (§ 2.7.8.2)', () => {
  const disk = { bytes: MiB, read: () => undefined, write: () => undefined, flush: () => undefined };
  const { status, used } = diskRequest(small(), disk, 1 << 30, PAGE_SIZE);
  expect({ status, used }).toEqual({ status: VIRTIO_BLK_S_IOERR, used: 0 });
});

test('a storage that fails is an I/O error of the guest, not the end of the host', () => {
  const fails = (): void => {
    throw new Error('ENOSPC');
  };
  const disk = { bytes: MiB, read: fails, write: fails, flush: fails };
  expect(diskRequest(small(), disk, 0, PAGE_SIZE).status).toBe(VIRTIO_BLK_S_IOERR);
});

test('a disk read that is whole is', () => {
  const disk = { bytes: MiB, read: () => undefined, write: () => undefined, flush: () => undefined };
  const { status, used } = diskRequest(small(), disk, 0, PAGE_SIZE);
  expect({ status, used }).toEqual({ status: VIRTIO_BLK_S_OK, used: PAGE_SIZE + 1 });
});

// ── Memory device ────────────────────────────────────────────────────────────────────────────────────────────────

interface Plugged extends Attached {
  readonly device: MemoryDevice;
  /** Sends a request and kicks; `settle` carries it out. */
  readonly send: (type: number, block: number, blocks: number) => void;
  /** The answer to the last request. */
  readonly answer: () => number;
}

/** 16 blocks of 1 MiB above 32 MiB, none of them plugged. */
function memoryOn(host: TestHost, options: { profile?: MemoryProfile; holder?: PageHolder } = {}): Plugged {
  const device = new MemoryDevice({
    port: portOf(host),
    id: 'vm0',
    addr: 32 * MiB,
    regionBytes: 16 * MiB,
    blockBytes: MiB,
    node: 0,
    requestedBytes: 16 * MiB,
    ...options,
    region: wholeRegion(host.vm, PAGE_SIZE),
  });
  host.vm.addGate(device.unplugged);
  const attached = attach(host, device, []);
  const [ring] = attached.rings;
  return {
    ...attached,
    device,
    send(type, block, blocks) {
      ring.u32(BUFFER, type);
      ring.u32(BUFFER + 8, (32 + block) * MiB);
      ring.u32(BUFFER + 12, 0);
      ring.u32(BUFFER + 16, blocks);
      ring.desc(0, BUFFER, 24, VIRTQ_DESC_F_NEXT, 1);
      ring.desc(1, BUFFER + 64, 10, VIRTQ_DESC_F_WRITE);
      ring.avail(0);
      attached.driver.kick(0);
    },
    answer: () => ring.readU32(BUFFER + 64) & 0xffff,
  };
}

const big = (): TestHost => testHost({ hostBytes: 96 * MiB, ramBytes: 48 * MiB, huge: 'never' });

test('a PLUG that is under way is over when the reset is', () => {
  const host = big();
  const m = memoryOn(host, { profile: 'rfc-write-protect' });
  const [v0, v1] = host.vcpus;
  v1.enterGuest();
  // Maps the page of zeros, which has to go before the block is memory.
  v1.load32(gfn(8192), 0);
  m.send(VIRTIO_MEM_REQ_PLUG, 0, 4);
  for (let i = 0; i < 10; i++) host.poll();
  expect(m.device.pluggedBytes).toBe(0);
  host.tasks.spawn(
    'v1',
    (function* () {
      for (let i = 0; i < 20; i++) yield undefined;
      v1.leaveGuest();
    })(),
  );
  v0.enterGuest();
  v0.mmioWrite(BASE + MMIO_STATUS, 4, 0);
  const atReset = m.driver.readConfig64(40);
  settle(host);
  expect([atReset, m.driver.readConfig64(40)]).toEqual([4 * MiB, 4 * MiB]);
});

test.each([VIRTIO_MEM_REQ_PLUG, VIRTIO_MEM_REQ_UNPLUG])(
  'a system reset in the middle of request %i leaves nothing plugged',
  (type) => {
    const host = big();
    const m = memoryOn(host, { profile: 'rfc-write-protect' });
    if (type === VIRTIO_MEM_REQ_UNPLUG) {
      m.send(VIRTIO_MEM_REQ_PLUG, 0, 4);
      settle(host);
    }
    const [, v1] = host.vcpus;
    v1.enterGuest();
    v1.load32(gfn(8192), 0);
    m.send(type, 0, 4);
    for (let i = 0; i < 10; i++) host.poll();
    m.transport.reset();
    let over = false;
    host.tasks.spawn(
      'reset',
      (function* () {
        yield* m.device.systemReset('virtio-1.2');
        over = true;
      })(),
    );
    for (let i = 0; i < 10; i++) host.poll();
    expect(over).toBe(false);
    v1.leaveGuest();
    settle(host);
    expect([over, m.device.pluggedBytes, m.device.plugged.count()]).toEqual([true, 0, 0]);
  },
);

test('UNPLUG_ALL asks who holds pages, as UNPLUG does', () => {
  const host = big();
  let refuses = false;
  const m = memoryOn(host, { holder: { map: () => true, unmap: () => !refuses } });
  m.send(VIRTIO_MEM_REQ_PLUG, 0, 4);
  settle(host);
  refuses = true;
  m.send(VIRTIO_MEM_REQ_UNPLUG_ALL, 0, 0);
  settle(host);
  expect([m.answer(), m.device.pluggedBytes]).toEqual([VIRTIO_MEM_RESP_BUSY, 4 * MiB]);
  refuses = false;
  m.send(VIRTIO_MEM_REQ_UNPLUG_ALL, 0, 0);
  settle(host);
  expect(m.device.pluggedBytes).toBe(0);
});

test('a block that a device with pinned memory cannot have is not plugged: BUSY', () => {
  const host = big();
  let told = 0;
  const m = memoryOn(host, { holder: { map: () => ++told > 1, unmap: () => true } });
  m.send(VIRTIO_MEM_REQ_PLUG, 0, 4);
  settle(host);
  expect([m.answer(), m.device.pluggedBytes, m.device.plugged.count()]).toEqual([VIRTIO_MEM_RESP_BUSY, 0, 0]);
  m.send(VIRTIO_MEM_REQ_PLUG, 0, 4);
  settle(host);
  expect(m.device.pluggedBytes).toBe(4 * MiB);
});

test('ConfigGeneration moves when plugged_size does', () => {
  const host = big();
  const m = memoryOn(host);
  const before = m.transport.read(MMIO_CONFIG_GENERATION, 4);
  m.send(VIRTIO_MEM_REQ_PLUG, 0, 4);
  settle(host);
  expect(m.device.pluggedBytes).toBe(4 * MiB);
  expect(m.transport.read(MMIO_CONFIG_GENERATION, 4)).not.toBe(before);
});
