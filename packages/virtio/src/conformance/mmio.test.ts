/** One test per MUST of virtio over MMIO (virtio 1.4 § 4.2), the sentence in its name. RING_RESET is not offered. */
import { describe, expect, test } from 'vitest';
import { MmioDriver } from '../driver/index.ts';
import { RawRing, rig, RINGS, QUEUE_SIZE } from '../testing/index.ts';
import {
  Features,
  MMIO_CONFIG,
  MMIO_CONFIG_GENERATION,
  MMIO_DEVICE_FEATURES,
  MMIO_DEVICE_FEATURES_SEL,
  MMIO_DRIVER_FEATURES,
  MMIO_DRIVER_FEATURES_SEL,
  MMIO_INTERRUPT_ACK,
  MMIO_INTERRUPT_STATUS,
  MMIO_QUEUE_NOTIFY,
  MMIO_QUEUE_NUM,
  MMIO_QUEUE_NUM_MAX,
  MMIO_QUEUE_READY,
  MMIO_QUEUE_SEL,
  MMIO_STATUS,
  STATUS_ACKNOWLEDGE,
  STATUS_DEVICE_NEEDS_RESET,
  STATUS_DRIVER,
  STATUS_DRIVER_OK,
  STATUS_FAILED,
  STATUS_FEATURES_OK,
  VIRTIO_F_VERSION_1,
  VIRTQ_DESC_F_WRITE,
} from '../uapi/index.ts';

/** Registers by direction, from the table "MMIO Device Register Layout". */
const READ_ONLY = [0x000, 0x004, 0x008, 0x00c, 0x010, 0x034, 0x060, 0x0fc];
const WRITE_ONLY = [
  0x014, 0x020, 0x024, 0x030, 0x038, 0x050, 0x064, 0x080, 0x084, 0x090, 0x094, 0x0a0, 0x0a4,
];
const READ_WRITE = [0x044, 0x070];

describe('device', () => {
  test('The device MUST return 0x74726976 in MagicValue', () =>
    expect(rig().transport.read(0, 4)).toBe(0x74726976));
  test('The device MUST return value 0x2 in Version', () => expect(rig().transport.read(4, 4)).toBe(2));

  test('The device MUST present each event in InterruptStatus until the driver acknowledges it; bits of no event MUST be zero', () => {
    const r = rig();
    expect(r.transport.read(MMIO_INTERRUPT_STATUS, 4)).toBe(0);
    r.device.host?.configChanged();
    expect(r.transport.read(MMIO_INTERRUPT_STATUS, 4)).toBe(2);
    r.transport.write(MMIO_INTERRUPT_ACK, 4, 1);
    expect(r.transport.read(MMIO_INTERRUPT_STATUS, 4)).toBe(2);
    r.transport.write(MMIO_INTERRUPT_ACK, 4, 2);
    expect(r.transport.read(MMIO_INTERRUPT_STATUS, 4)).toBe(0);
  });

  test('Upon reset, the device MUST clear all bits in InterruptStatus and ready bits in QueueReady for all queues', () => {
    const r = rig();
    r.device.host?.configChanged();
    r.transport.write(MMIO_STATUS, 4, 0);
    r.transport.write(MMIO_QUEUE_SEL, 4, 0);
    expect([MMIO_INTERRUPT_STATUS, MMIO_QUEUE_READY, MMIO_STATUS].map((o) => r.transport.read(o, 4))).toEqual(
      [0, 0, 0],
    );
    expect(r.device.resets).toBeGreaterThan(0);
  });

  test('a queue that was taken away from a live device is away until the reset: it does not read as ready', () => {
    const r = rig();
    r.transport.write(MMIO_QUEUE_SEL, 4, 0);
    r.transport.write(MMIO_QUEUE_READY, 4, 0);
    r.transport.write(MMIO_QUEUE_READY, 4, 1);
    expect(r.transport.read(MMIO_QUEUE_READY, 4)).toBe(0);
  });

  test('The device MUST change ConfigGeneration if there is any risk of a driver seeing an inconsistent configuration state', () => {
    const r = rig();
    const before = r.transport.read(MMIO_CONFIG_GENERATION, 4);
    r.device.host?.configChanged();
    expect(r.transport.read(MMIO_CONFIG_GENERATION, 4)).not.toBe(before);
  });

  test('The device MUST NOT access virtqueue contents when QueueReady is zero', () => {
    const r = rig({ bringUp: false });
    r.driver.begin(42);
    r.driver.writeFeatures(r.device.offered);
    r.driver.acceptFeatures(r.device.offered);
    r.driver.driverOk();
    new RawRing(r.memory, QUEUE_SIZE, RINGS).avail(0);
    r.driver.kick(0);
    expect(r.device.queue).toBe(null);
    expect(r.transport.counters.kicksForMissingQueue).toBe(1);
  });

  test('a status write never clears a bit, and FEATURES_OK does not stick without VERSION_1 or with a bit that was not offered', () => {
    const r = rig({ bringUp: false });
    r.driver.begin(42);
    r.transport.write(MMIO_STATUS, 4, STATUS_ACKNOWLEDGE);
    expect(r.transport.status).toBe(STATUS_ACKNOWLEDGE | STATUS_DRIVER);
    r.driver.writeFeatures(new Features(1 << 5, 1));
    r.driver.addStatus(STATUS_FEATURES_OK);
    expect(r.transport.status & STATUS_FEATURES_OK).toBe(0);
    r.driver.writeFeatures(new Features(r.device.offered.low, 0));
    r.driver.addStatus(STATUS_FEATURES_OK);
    expect(r.transport.status & STATUS_FEATURES_OK).toBe(0);
  });

  test('features written twice: the last write before FEATURES_OK counts, later ones are refused', () => {
    const r = rig({ bringUp: false });
    r.driver.begin(42);
    r.driver.writeFeatures(r.device.offered);
    r.driver.writeFeatures(Features.of(VIRTIO_F_VERSION_1));
    r.driver.addStatus(STATUS_FEATURES_OK);
    expect(r.transport.status & STATUS_FEATURES_OK).toBe(STATUS_FEATURES_OK);
    r.driver.writeFeatures(r.device.offered);
    expect(r.transport.negotiated).toEqual(Features.of(VIRTIO_F_VERSION_1));
  });

  test('a kick before DRIVER_OK consumes nothing; the queue is polled at DRIVER_OK', () => {
    const r = rig({ bringUp: false });
    r.driver.begin(42);
    r.driver.writeFeatures(r.device.offered);
    r.driver.acceptFeatures(r.device.offered);
    r.queue.reset(r.memory);
    r.driver.setupQueue(0, QUEUE_SIZE, RINGS);
    r.queue.add(r.memory, [{ gpa: 0x20000, length: 4 }], [], 0);
    r.queue.publish(r.memory);
    r.driver.kick(0);
    expect(r.device.kicks).toEqual([]);
    r.driver.driverOk();
    expect(r.device.kicks).toEqual([0]);
  });

  test('rings that are not aligned as § 2.7 says do not become ready', () => {
    for (const [part, by] of [
      ['desc', 8],
      ['driver', 1],
      ['device', 2],
    ] as const) {
      const r = rig({ bringUp: false });
      r.driver.begin(42);
      r.driver.writeFeatures(r.device.offered);
      r.driver.acceptFeatures(r.device.offered);
      const rings = { ...RINGS, [part]: RINGS[part] + by };
      expect(r.driver.setupQueue(0, QUEUE_SIZE, rings)).toEqual({ ok: false, error: 'EINVAL' });
    }
  });

  test('after a reset nothing is negotiated: what the last driver wrote is not what the next one accepts', () => {
    const r = rig();
    r.driver.reset();
    r.driver.addStatus(STATUS_ACKNOWLEDGE);
    r.driver.addStatus(STATUS_DRIVER);
    r.driver.addStatus(STATUS_FEATURES_OK);
    expect([r.transport.status & STATUS_FEATURES_OK, r.transport.negotiated]).toEqual([
      0,
      new Features(0, 0),
    ]);
  });

  test('a queue size that is no power of two, too large, or zero does not become ready', () => {
    for (const size of [0, 3, 48, QUEUE_SIZE * 2]) {
      const r = rig({ bringUp: false });
      r.driver.begin(42);
      r.driver.writeFeatures(r.device.offered);
      r.driver.acceptFeatures(r.device.offered);
      expect(r.driver.setupQueue(0, size, RINGS)).toEqual({ ok: false, error: 'EINVAL' });
    }
  });

  test('a queue of one entry works', () => {
    const r = rig({ size: 1 });
    expect(r.queue.add(r.memory, [{ gpa: 0x20000, length: 4 }], [], 5)).toBe(true);
    r.queue.publish(r.memory);
    const chain = r.device.queue?.pop();
    if (chain) r.device.queue?.push(chain, 0);
    expect(r.queue.popUsed(r.memory)).toBe(5);
  });

  test('a kick for a missing queue is counted and harmless', () => {
    const r = rig();
    r.transport.write(MMIO_QUEUE_NOTIFY, 4, 17);
    expect([
      r.transport.counters.kicksForMissingQueue,
      r.transport.status & STATUS_DEVICE_NEEDS_RESET,
    ]).toEqual([1, 0]);
  });

  test('accesses of other widths, unaligned, or outside the layout read 0 and change nothing', () => {
    const r = rig();
    for (const [offset, width] of [
      [0, 1],
      [2, 2],
      [0x048, 4],
      [MMIO_CONFIG + 15, 4],
      [MMIO_CONFIG + 16, 1],
    ] as const) {
      expect(r.transport.read(offset, width)).toBe(0);
      r.transport.write(offset, width, 0xffff);
    }
    expect(r.transport.counters.badAccesses).toBeGreaterThanOrEqual(8);
    expect(r.transport.status & STATUS_DRIVER_OK).toBe(STATUS_DRIVER_OK);
  });

  test('a device that found a broken ring sets DEVICE_NEEDS_RESET, interrupts, and serves no kick until it is reset', () => {
    const r = rig();
    r.device.host?.needsReset('avail-index-jump');
    expect(r.transport.read(MMIO_STATUS, 4) & STATUS_DEVICE_NEEDS_RESET).toBe(STATUS_DEVICE_NEEDS_RESET);
    expect(r.interrupts.count).toBe(1);
    r.driver.kick(0);
    expect(r.device.kicks).toEqual([]);
    r.driver.reset();
    expect(r.transport.read(MMIO_STATUS, 4)).toBe(0);
  });
});

describe('driver', () => {
  const offsets = (log: readonly string[], kind: 'R' | 'W'): number[] =>
    log.filter((l) => l.startsWith(kind)).map((l) => Number.parseInt(l.slice(4, 7), 16));

  test('The driver MUST NOT access memory locations not described in the table; it writes no read-only and reads no write-only register', () => {
    const { log } = rig();
    for (const o of offsets(log, 'R')) expect([...READ_ONLY, ...READ_WRITE]).toContain(o);
    for (const o of offsets(log, 'W')) expect([...WRITE_ONLY, ...READ_WRITE]).toContain(o);
  });

  test('The driver MUST only use 32 bit wide and aligned reads and writes to access the control registers', () => {
    for (const line of rig().log) expect(line).toMatch(/^[RW] 0x[0-9a-f]*[048c]\/4/);
  });

  test('the driver MUST use 32 bit wide and aligned accesses for 32 and 64 bit wide fields [of the configuration]', () => {
    const r = rig();
    r.log.length = 0;
    new DataView(r.device.config.buffer).setUint32(8, 5, true);
    new DataView(r.device.config.buffer).setUint32(12, 1, true);
    expect(r.driver.readConfig64(8)).toBe(0x1_0000_0005);
    expect(r.log).toEqual(['R 0x0fc/4', 'R 0x108/4', 'R 0x10c/4', 'R 0x0fc/4']);
  });

  test('a 64-bit field that changes between its halves is read again', () => {
    const r = rig();
    const view = new DataView(r.device.config.buffer);
    view.setUint32(8, 1, true);
    let torn = true;
    const driver = new MmioDriver({
      read(offset, width) {
        const value = r.transport.read(offset, width);
        if (offset === MMIO_CONFIG + 8 && torn) {
          torn = false;
          view.setUint32(8, 7, true);
          view.setUint32(12, 7, true);
          r.device.host?.configChanged();
        }
        return value;
      },
      write: (offset, width, value) => r.transport.write(offset, width, value),
    });
    expect(driver.readConfig64(8)).toBe(7 * 2 ** 32 + 7);
  });

  const probe = (magic: number, version: number, id: number): { result: unknown; log: string[] } => {
    const log: string[] = [];
    const driver = new MmioDriver({
      read(offset) {
        log.push(`R ${offset}`);
        return offset === 0 ? magic : offset === 4 ? version : id;
      },
      write: (offset) => void log.push(`W ${offset}`),
    });
    return { result: driver.begin(5), log };
  };

  test('The driver MUST ignore a device with MagicValue which is not 0x74726976', () => {
    expect(probe(0x1234, 2, 5)).toEqual({ result: { ok: false, error: 'ENODEV' }, log: ['R 0'] });
  });
  test('The driver MUST ignore a device with Version which is not 0x2', () => {
    expect(probe(0x74726976, 1, 5)).toEqual({ result: { ok: false, error: 'ENODEV' }, log: ['R 0', 'R 4'] });
  });
  test('The driver MUST start by reading MagicValue and Version, then DeviceID; if it is zero it MUST abort and MUST NOT access any other register', () => {
    expect(probe(0x74726976, 2, 0).log).toEqual(['R 0', 'R 4', 'R 8']);
  });

  test('Before reading from DeviceFeatures, the driver MUST write a value to DeviceFeaturesSel', () => {
    const { log } = rig();
    log.forEach((line, i) => {
      if (Number.parseInt(line.slice(4, 7), 16) === MMIO_DEVICE_FEATURES)
        expect(Number.parseInt(log[i - 1].slice(4, 7), 16)).toBe(MMIO_DEVICE_FEATURES_SEL);
    });
  });
  test('Before writing to the DriverFeatures register, the driver MUST write a value to the DriverFeaturesSel register', () => {
    const { log } = rig();
    log.forEach((line, i) => {
      if (Number.parseInt(line.slice(4, 7), 16) === MMIO_DRIVER_FEATURES)
        expect(Number.parseInt(log[i - 1].slice(4, 7), 16)).toBe(MMIO_DRIVER_FEATURES_SEL);
    });
  });
  test('The driver MUST write a value to QueueSize which is less than or equal to the value presented by the device in QueueSizeMax', () => {
    const r = rig();
    r.transport.write(MMIO_QUEUE_SEL, 4, 0);
    const written = Number(
      r.log.find((l) => l.startsWith(`W 0x0${MMIO_QUEUE_NUM.toString(16)}`))?.split('=')[1],
    );
    expect(written).toBeLessThanOrEqual(r.transport.read(MMIO_QUEUE_NUM_MAX, 4));
  });
  test('When QueueReady is not zero, the driver MUST NOT access the queue registers', () => {
    const { log } = rig();
    const ready = log.findIndex((l) => l.startsWith('W 0x044'));
    for (const line of log.slice(ready + 1)) expect(line).not.toMatch(/^W 0x0(38|8|9|a)/);
  });
  test('The driver MUST ignore undefined bits in InterruptStatus and MUST NOT set any of them in InterruptACK; it reads the status and acknowledges what it handled', () => {
    const r = rig();
    r.device.host?.configChanged();
    r.log.length = 0;
    expect(r.driver.takeInterrupt()).toBe(2);
    expect(r.log).toEqual(['R 0x060/4', 'W 0x064/4=2']);
  });
  test('Drivers not expecting shared memory MUST NOT use the shared memory registers', () => {
    for (const line of rig().log) expect(line).not.toMatch(/0x0(ac|b)/);
  });
  test('Further initialization MUST follow the general procedure: ACKNOWLEDGE, DRIVER, features, FEATURES_OK, re-read, queues, DRIVER_OK', () => {
    const { log } = rig();
    const writes = log.filter((l) => l.startsWith('W 0x070')).map((l) => Number(l.split('=')[1]));
    expect(writes).toEqual([0, 1, 3, 11, 15]);
    const ok = log.findIndex((l) => l === 'W 0x070/4=11');
    expect(log[ok + 1]).toBe('R 0x070/4');
  });
  test('a missing queue fails the probe with ENOENT, a missing VERSION_1 with EINVAL; both set FAILED', () => {
    const r = rig({ bringUp: false });
    r.driver.begin(42);
    expect(r.driver.queueMax(9)).toEqual({ ok: false, error: 'ENOENT' });
    expect(r.driver.acceptFeatures(Features.of(1))).toEqual({ ok: false, error: 'EINVAL' });
    expect(r.transport.status & STATUS_FAILED).toBe(STATUS_FAILED);
  });
});

test('bytes past the writable part are never written', () => {
  const r = rig();
  const raw = new RawRing(r.memory, QUEUE_SIZE, RINGS);
  raw.desc(0, 0x20000, 4, VIRTQ_DESC_F_WRITE);
  raw.avail(0);
  expect(r.device.queue?.pop()?.write(0, new Uint8Array(64).fill(1))).toBe(4);
  expect(raw.readU32(0x20004)).toBe(0);
});
