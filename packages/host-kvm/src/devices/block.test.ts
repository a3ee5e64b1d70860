/** The block device over a VM's memory and over a plain buffer. */
import { describe, expect, test } from 'vitest';
import { COST_TABLE, FlatGuestMemory, inlineSchedule, MiB } from '@ebb/machine';
import { MmioTransport } from '@ebb/virtio/device';
import { MmioDriver } from '@ebb/virtio/driver';
import { RawRing } from '@ebb/virtio/testing';
import {
  VIRTIO_BLK_S_IOERR,
  VIRTIO_BLK_S_OK,
  VIRTIO_BLK_S_UNSUPP,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
} from '@ebb/virtio/uapi';
import { HostTasks } from '../host-tasks.ts';
import { testHost } from '../kvm/testing-host.ts';
import { BlockDevice, type BlockStorage } from './block.ts';

const RINGS = { desc: 0x100000, driver: 0x101000, device: 0x102000 };

function storage(bytes: number): BlockStorage & { data: Uint8Array; flushes: number } {
  const data = new Uint8Array(bytes);
  return {
    data,
    bytes,
    flushes: 0,
    read(offset, out) {
      out.set(data.subarray(offset, offset + out.length));
    },
    write(offset, from) {
      data.set(from, offset);
    },
    flush() {
      this.flushes++;
    },
  };
}

describe.each(['a VM of this host', 'a plain buffer'])('over %s', (world) => {
  const setup = () => {
    const host = world === 'a VM of this host' ? testHost() : null;
    const tasks = host?.tasks ?? new HostTasks(inlineSchedule);
    const memory = host?.vm.memory ?? new FlatGuestMemory(new ArrayBuffer(16 * MiB));
    const disk = storage(MiB);
    const device = new BlockDevice(disk, {
      spawn: (n, b) => void tasks.spawn(n, b),
      now: () => 0,
      costs: COST_TABLE,
    });
    const transport = new MmioTransport({ device, memory, interrupt: () => undefined });
    const driver = new MmioDriver(transport);
    driver.begin(2);
    driver.writeFeatures(device.offered);
    driver.acceptFeatures(device.offered);
    driver.setupQueue(0, 64, RINGS);
    driver.driverOk();
    const raw = new RawRing(memory, 64, RINGS);
    /** One request: type, sector, data length and direction; its status byte. */
    const request = (type: number, sector: number, length: number, write: boolean): number => {
      raw.u32(0x200000, type);
      raw.u32(0x200008, sector);
      raw.u32(0x20000c, Math.floor(sector / 2 ** 32));
      raw.u32(0x200100, 0xff);
      raw.desc(0, 0x200000, 16, VIRTQ_DESC_F_NEXT, length > 0 ? 1 : 2);
      if (length > 0) raw.desc(1, 0x300000, length, VIRTQ_DESC_F_NEXT | (write ? 0 : VIRTQ_DESC_F_WRITE), 2);
      raw.desc(2, 0x200100, 1, VIRTQ_DESC_F_WRITE);
      raw.avail(0);
      driver.kick(0);
      while (tasks.step());
      return raw.readU32(0x200100) & 0xff;
    };
    return { raw, disk, device, driver, transport, tasks, request };
  };

  test('what is written is read back, from the disk', () => {
    const { raw, disk, request } = setup();
    for (let i = 0; i < 8192; i += 4) raw.u32(0x300000 + i, i * 7);
    expect(request(1, 16, 8192, true)).toBe(VIRTIO_BLK_S_OK);
    expect(new Int32Array(disk.data.buffer, 16 * 512, 4)[1]).toBe(28);
    for (let i = 0; i < 8192; i += 4) raw.u32(0x300000 + i, 0);
    expect(request(0, 16, 8192, false)).toBe(VIRTIO_BLK_S_OK);
    expect([raw.readU32(0x300004), raw.readU32(0x300000 + 8188)]).toEqual([28, 8188 * 7]);
    expect(raw.used(1).length).toBe(8193);
  });
  test('flush reaches the storage', () => {
    const { disk, request } = setup();
    expect(request(4, 0, 0, false)).toBe(VIRTIO_BLK_S_OK);
    expect(disk.flushes).toBe(1);
  });
  test('beyond the end, not whole sectors, or too long is an I/O error and moves no byte', () => {
    const { disk, request, device } = setup();
    expect(request(0, 2047, 1024, false)).toBe(VIRTIO_BLK_S_IOERR);
    expect(request(1, 0, 100, true)).toBe(VIRTIO_BLK_S_IOERR);
    expect(request(0, 2 ** 40, 512, false)).toBe(VIRTIO_BLK_S_IOERR);
    expect(disk.data.every((v) => v === 0)).toBe(true);
    expect(device.counters.errors).toBe(3);
  });
  test('the last sector is there', () => {
    const { request } = setup();
    expect([request(1, 2047, 512, true), request(0, 2047, 512, false)]).toEqual([
      VIRTIO_BLK_S_OK,
      VIRTIO_BLK_S_OK,
    ]);
  });
  test('a flush that fails is an I/O error', () => {
    const { disk, request } = setup();
    disk.flush = () => {
      throw new Error('ENOSPC');
    };
    expect(request(4, 0, 0, false)).toBe(VIRTIO_BLK_S_IOERR);
  });
  test('a disk of 4 TiB has the upper half of its capacity', () => {
    const { disk, driver } = setup();
    Object.assign(disk, { bytes: 2 ** 42 + 512 });
    expect(driver.readConfig64(0)).toBe(2 ** 33 + 1);
  });
  test('an unknown type is unsupported', () =>
    expect(setup().request(99, 0, 512, false)).toBe(VIRTIO_BLK_S_UNSUPP));
  test('capacity is read in halves; the configuration is read-only', () => {
    const { driver, transport } = setup();
    transport.write(0x100, 4, 7);
    expect(driver.readConfig64(0)).toBe(2048);
  });
  test('a request without room for its status is not answered with one', () => {
    const { raw, driver, tasks, device } = setup();
    raw.desc(0, 0x200000, 16, 0);
    raw.avail(0);
    driver.kick(0);
    while (tasks.step());
    expect([raw.usedIdx, device.counters.errors]).toEqual([1, 1]);
  });
});
