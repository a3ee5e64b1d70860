/** The balloon device against recorded driver behaviour, over a VM's memory and over a plain buffer that is no VM. */
import { beforeEach, describe, expect, test } from 'vitest';
import { COST_TABLE, FlatGuestMemory, gfn, inlineSchedule, MiB, type GuestMemory } from '@ebb/machine';
import { MmioTransport } from '@ebb/virtio/device';
import { MmioDriver } from '@ebb/virtio/driver';
import { RawRing } from '@ebb/virtio/testing';
import {
  BALLOON_CFG_ACTUAL,
  BALLOON_CFG_FREE_PAGE_HINT_CMD_ID,
  BALLOON_CFG_NUM_PAGES,
  BALLOON_CFG_POISON_VAL,
  Features,
  MMIO_CONFIG_GENERATION,
  VIRTIO_BALLOON_F_FREE_PAGE_HINT,
  VIRTIO_BALLOON_F_PAGE_POISON,
  VIRTIO_BALLOON_F_REPORTING,
  VIRTIO_BALLOON_F_STATS_VQ,
  VIRTIO_F_VERSION_1,
  VIRTIO_ID_BALLOON,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
} from '@ebb/virtio/uapi';
import { HostTasks, type TaskYield } from '../host-tasks.ts';
import { testHost } from '../kvm/testing-host.ts';
import { BalloonDevice } from './balloon.ts';
import type { DiscardPort } from './device-port.ts';

const ALL = [0, 1, 2, 3, 4, 5];
const QUEUE = 64;
const rings = (q: number): { desc: number; driver: number; device: number } => ({
  desc: 0x100000 + q * 0x3000,
  driver: 0x101000 + q * 0x3000,
  device: 0x102000 + q * 0x3000,
});
const BUFFER = 0x200000;

interface Bench {
  readonly memory: GuestMemory;
  readonly device: BalloonDevice;
  readonly transport: MmioTransport;
  readonly driver: MmioDriver;
  readonly ring: RawRing[];
  /** Runs of pages discarded, in order. */
  readonly discarded: [number, number][];
  /** Used indices of all queues at the end of each discard. */
  readonly usedAtEnd: number[][];
  /** Lines as QEMU prints them. */
  readonly trace: string[];
  readonly step: () => boolean;
  /** Starts a task that has nothing to do. */
  readonly company: () => void;
  readonly pump: () => void;
  /** Sends one chain of one segment and serves it; the queue's used index after it. */
  send(queue: number, bytes: Uint8Array | null, segments?: readonly (readonly [number, number])[]): number;
}

/** Where the guest's memory is: a VM of this host, or nobody's. */
const worlds = ['a VM of this host', 'a plain buffer'] as const;

function bench(
  world: (typeof worlds)[number],
  features: readonly number[] = ALL,
  unitPages = 1,
  accept = features,
  numbering: 'compact' | 'spec' = 'compact',
): Bench {
  const discarded: [number, number][] = [];
  const usedAtEnd: number[][] = [];
  const ring: RawRing[] = [];
  const trace: string[] = [];
  const host =
    world === 'a VM of this host'
      ? testHost({ ramBytes: 16 * MiB, huge: unitPages > 1 ? 'hugetlb' : 'always' })
      : null;
  const tasks = host?.tasks ?? new HostTasks(inlineSchedule);
  const memory = host?.vm.memory ?? new FlatGuestMemory(new ArrayBuffer(16 * MiB));
  const port: DiscardPort = {
    ramPages: 4096,
    unitPages,
    *discard(runs: Int32Array, n: number): Generator<TaskYield, number, void> {
      for (let r = 0; r < n; r++) discarded.push([runs[2 * r], runs[2 * r + 1]]);
      yield undefined;
      let freed = discarded.reduce((sum, [, count]) => sum + count, 0);
      if (host !== null) freed = yield* host.vm.discard(runs, n);
      usedAtEnd.push(ring.map((raw) => raw.usedIdx));
      return freed;
    },
  };
  const device = new BalloonDevice({
    port: { spawn: (name, body) => void tasks.spawn(name, body), now: () => 0, costs: COST_TABLE },
    memory: port,
    features,
    numbering,
    trace: (line) => trace.push(line),
  });
  const transport = new MmioTransport({ device, memory, interrupt: () => undefined });
  const driver = new MmioDriver(transport);
  driver.begin(VIRTIO_ID_BALLOON);
  const negotiated = Features.of(...accept, VIRTIO_F_VERSION_1);
  driver.writeFeatures(negotiated);
  driver.acceptFeatures(negotiated);
  device.queueMax.forEach((max, q) => {
    ring.push(new RawRing(memory, QUEUE, rings(q)));
    if (max > 0) driver.setupQueue(q, QUEUE, rings(q));
  });
  driver.driverOk();
  const pump = (): void => {
    while (tasks.step());
  };
  return {
    memory,
    device,
    transport,
    driver,
    ring,
    discarded,
    usedAtEnd,
    trace,
    step: () => tasks.step(),
    company: () =>
      void tasks.spawn(
        'company',
        (function* () {
          for (let i = 0; i < 100; i++) yield undefined;
        })(),
      ),
    pump,
    send(queue, bytes, segments = []) {
      const raw = ring[queue];
      let at = 0;
      if (bytes !== null) {
        for (let i = 0; i < bytes.length; i += 4)
          raw.u32(BUFFER + i, new DataView(bytes.buffer).getUint32(i, true));
        raw.desc(0, BUFFER, bytes.length, 0);
        at = 1;
      }
      segments.forEach(([gpa, length], i) =>
        raw.desc(
          at + i,
          gpa,
          length,
          VIRTQ_DESC_F_WRITE | (i < segments.length - 1 ? VIRTQ_DESC_F_NEXT : 0),
          at + i + 1,
        ),
      );
      raw.avail(0);
      driver.kick(queue);
      pump();
      return raw.usedIdx;
    },
  };
}
const pfns = (...list: number[]): Uint8Array => new Uint8Array(Uint32Array.from(list).buffer);

describe.each(worlds)('over %s', (world) => {
  let b: Bench;
  beforeEach(() => {
    b = bench(world);
  });

  test('inflate discards each page before it returns the buffer (I3b)', () => {
    const raw = b.ring[0];
    raw.u32(BUFFER, 600);
    raw.u32(BUFFER + 4, 601);
    raw.desc(0, BUFFER, 8, 0);
    raw.avail(0);
    b.driver.kick(0);
    b.pump();
    expect(b.discarded).toEqual([[600, 2]]);
    // When the discard was over, the buffer was still the device's.
    expect(b.usedAtEnd.map((used) => used[0])).toEqual([0]);
    expect(raw.usedIdx).toBe(1);
    expect(b.device.counters.inflatedPages).toBe(2);
  });

  test('a page inflated again goes back again, if it was touched or not, and is counted once', () => {
    b.send(0, pfns(600));
    b.send(0, pfns(600, 600));
    expect([b.discarded, b.device.counters.inflatedPages]).toEqual([
      [
        [600, 1],
        [600, 1],
      ],
      1,
    ]);
  });

  test('a PFN twice, or beyond any RAM, is counted once and harmless', () => {
    b.send(0, pfns(600, 600, 0x7fffffff));
    expect([
      b.device.counters.inflatedPages,
      b.device.counters.badPfns,
      b.transport.counters.needsReset,
    ]).toEqual([1, 1, 0]);
  });

  test('deflate frees nothing and takes the page out of the book', () => {
    b.send(0, pfns(600));
    b.send(1, pfns(600, 601));
    expect([b.device.ballooned.count(), b.device.counters.deflatedPages, b.discarded.length]).toEqual([
      0, 1, 1,
    ]);
  });

  test('Within an output buffer submitted to the statsq, the device MUST ignore entries with unknown tags, and MUST accept entries in any order', () => {
    const bytes = new Uint8Array(32);
    const view = new DataView(bytes.buffer);
    [
      [9999, 1],
      [5, 512 * MiB],
      [4, 100 * MiB],
    ].forEach(([tag, value], i) => {
      view.setUint16(i * 10, tag, true);
      view.setUint32(i * 10 + 2, value, true);
    });
    b.send(2, bytes);
    expect(b.device.stats).toEqual({ 'stat-total-memory': 512 * MiB, 'stat-free-memory': 100 * MiB });
    // The buffer stays with the device until it wants fresh figures.
    expect(b.ring[2].usedIdx).toBe(0);
    expect([b.device.requestStats(), b.device.requestStats()]).toEqual([true, false]);
    expect(b.ring[2].usedIdx).toBe(1);
  });

  test('statistics made available before DRIVER_OK are found there', () => {
    const late = bench(world, ALL, 1);
    late.driver.reset();
    late.driver.begin(VIRTIO_ID_BALLOON);
    const features = Features.of(...ALL, VIRTIO_F_VERSION_1);
    late.driver.writeFeatures(features);
    late.driver.acceptFeatures(features);
    for (const q of [0, 1, 2, 3, 4]) late.driver.setupQueue(q, QUEUE, rings(q));
    late.ring[2].desc(0, BUFFER, 10, 0);
    late.ring[2].avail(0);
    late.driver.kick(2);
    late.pump();
    expect(late.device.counters.statsUpdates).toBe(0);
    late.driver.driverOk();
    late.pump();
    expect(late.device.counters.statsUpdates).toBe(1);
  });

  test('reporting discards whole ranges before the acknowledgement, in one flush, and skips unaligned ones (never outward)', () => {
    expect(
      b.send(4, null, [
        [0x400000, 0x200000],
        [0x800000, 0x400000],
        [0x600800, 0x1000],
      ]),
    ).toBe(1);
    expect(b.discarded).toEqual([
      [0x400, 0x200],
      [0x800, 0x400],
    ]);
    // One call for both, and the acknowledgement only after it.
    expect(b.usedAtEnd.map((used) => used[4])).toEqual([0]);
    expect(b.device.counters.skippedRanges).toBe(1);
  });

  test('If PAGE_POISON has been negotiated, the device MUST NOT modify a reported page to a value other than poison_val: nothing is discarded', () => {
    b.driver.writeConfig32(BALLOON_CFG_POISON_VAL, 0xaaaaaaaa);
    b.send(4, null, [[0x400000, 0x200000]]);
    expect([b.discarded.length, b.device.counters.skippedRanges]).toEqual([0, 1]);
  });

  test('an inhibited balloon discards nothing', () => {
    b.device.inhibited = true;
    b.send(4, null, [[0x400000, 0x200000]]);
    b.send(0, pfns(700));
    expect(b.discarded).toEqual([]);
  });

  test('hinting: The device MUST ignore pages of a command ID that does not match, MUST NOT reuse an id, and reports DONE at the end', () => {
    const id = (): number => b.driver.readConfig32(BALLOON_CFG_FREE_PAGE_HINT_CMD_ID);
    const page: (readonly [number, number])[] = [[0x400000, 0x400000]];
    b.device.startHinting();
    const first = id();
    expect(first).toBeGreaterThanOrEqual(2);
    b.send(3, null, page);
    expect(b.device.counters.staleHints).toBe(1);
    b.send(3, pfns(first));
    b.send(3, null, page);
    b.send(3, pfns(0));
    expect(b.device.stopHinting().count()).toBe(1024);
    expect(id()).toBe(1);
    b.send(3, null, page);
    expect(b.discarded).toEqual([]);
    b.device.startHinting();
    expect(id()).not.toBe(first);
    b.send(3, pfns(first));
    b.send(3, null, page);
    expect(b.device.stopHinting().count()).toBe(0);
  });

  test('hinting: an id that is not the round’s ends it, and a reset leaves nothing of it', () => {
    const id = (): number => b.driver.readConfig32(BALLOON_CFG_FREE_PAGE_HINT_CMD_ID);
    const page: (readonly [number, number])[] = [[0x400000, 0x400000]];
    b.device.startHinting();
    b.send(3, pfns(id()));
    b.send(3, pfns(id() + 7));
    b.send(3, null, page);
    expect(b.device.stopHinting().count()).toBe(0);
    b.device.startHinting();
    b.send(3, pfns(id()));
    b.send(3, null, page);
    b.driver.reset();
    expect([b.device.stopHinting().count(), id()]).toEqual([0, 0]);
  });

  test('num_pages and the command id are read-only, actual and poison_val are the driver’s; narrow writes are ignored', () => {
    b.device.setTarget(8 * MiB);
    b.driver.writeConfig32(BALLOON_CFG_NUM_PAGES, 1);
    b.driver.writeConfig32(BALLOON_CFG_FREE_PAGE_HINT_CMD_ID, 77);
    b.driver.writeConfig32(BALLOON_CFG_ACTUAL, 5);
    b.transport.write(0x104, 1, 0xff);
    expect([
      b.driver.readConfig32(BALLOON_CFG_NUM_PAGES),
      b.driver.readConfig32(BALLOON_CFG_FREE_PAGE_HINT_CMD_ID),
      b.device.actual,
    ]).toEqual([2048, 0, 5]);
  });

  test('a target above RAM size means no balloon; one byte leaves no whole page; the trace names the size taken', () => {
    b.device.setTarget(64 * MiB);
    expect(b.device.numPages).toBe(0);
    b.device.setTarget(1);
    expect(b.device.numPages).toBe(4095);
    expect(b.trace).toEqual([
      'virtio_balloon_to_target balloon target: 0x1000000 num_pages: 0',
      'virtio_balloon_to_target balloon target: 0x1 num_pages: 4095',
    ]);
  });

  test('the guest is told of a target it was told of before', () => {
    b.device.setTarget(8 * MiB);
    const generation = b.transport.read(MMIO_CONFIG_GENERATION, 4);
    b.device.setTarget(8 * MiB);
    expect(b.transport.read(MMIO_CONFIG_GENERATION, 4)).not.toBe(generation);
  });

  test('a malformed ring asks for a reset, and after the reset the device works again', () => {
    b.ring[0].availIdx(QUEUE + 9);
    b.driver.kick(0);
    b.pump();
    expect([b.transport.counters.needsReset, b.transport.brokenBecause]).toEqual([1, 'avail-index-jump']);
    b.driver.reset();
    expect(b.device.ballooned.count()).toBe(0);
  });

  test('a device reset while a discard runs: the buffer is not touched any more', () => {
    const raw = b.ring[0];
    raw.u32(BUFFER, 600);
    raw.desc(0, BUFFER, 4, 0);
    raw.avail(0);
    b.driver.kick(0);
    // With another task ready each takes one step at a time: we stop in the middle of the discard.
    b.company();
    while (b.discarded.length === 0) b.step();
    expect(b.usedAtEnd).toEqual([]);
    b.driver.reset();
    b.pump();
    expect(b.usedAtEnd).toHaveLength(1);
    expect(raw.usedIdx).toBe(0);
  });
});

describe('on 2 MiB host pages', () => {
  test('a host page is freed only when all its parts are in the balloon, and a reset forgets halves (QEMU 2019)', () => {
    const b = bench('a plain buffer', ALL, 512);
    const parts = (from: number, n: number): Uint8Array =>
      pfns(...Array.from({ length: n }, (_, i) => from + i));
    b.send(0, parts(1024, 511));
    expect(b.discarded).toEqual([]);
    b.send(0, pfns(1535));
    expect(b.discarded).toEqual([[1024, 512]]);
    b.send(0, parts(2048, 511));
    b.driver.reset();
    const again = b.device;
    expect(again.ballooned.count()).toBe(0);
    b.driver.begin(VIRTIO_ID_BALLOON);
    b.driver.writeFeatures(Features.of(VIRTIO_F_VERSION_1));
    b.driver.acceptFeatures(Features.of(VIRTIO_F_VERSION_1));
    b.driver.setupQueue(0, QUEUE, rings(0));
    for (const part of [rings(0).driver, rings(0).device])
      for (let i = 0; i < 128; i += 4) b.ring[0].u32(part + i, 0);
    b.ring[0].availIdx(0);
    b.driver.driverOk();
    b.send(0, pfns(2559));
    expect(b.discarded).toEqual([[1024, 512]]);
  });
});

test('on 2 MiB host pages a part that was taken out again is not in', () => {
  const b = bench('a plain buffer', ALL, 512);
  b.send(0, pfns(1024));
  b.send(1, pfns(1024));
  b.send(0, pfns(...Array.from({ length: 511 }, (_, i) => 1025 + i)));
  expect(b.discarded).toEqual([]);
  b.send(0, pfns(1024));
  expect(b.discarded).toEqual([[1024, 512]]);
});

test('hinting: a page that is only partly in a buffer is not hinted', () => {
  const b = bench('a plain buffer');
  b.device.startHinting();
  b.send(3, pfns(b.driver.readConfig32(BALLOON_CFG_FREE_PAGE_HINT_CMD_ID)));
  b.send(3, null, [[0x400800, 0x2000]]);
  expect([b.device.counters.hintedPages, b.device.stopHinting().has(0x401)]).toEqual([1, true]);
});

test('a reset forgets the round and the poison of the driver that was; the next, without either, is served', () => {
  const b = bench('a plain buffer');
  b.driver.writeConfig32(BALLOON_CFG_POISON_VAL, 0xaaaaaaaa);
  b.device.startHinting();
  b.driver.reset();
  expect([b.device.hintCommandId, b.device.poisonValue]).toEqual([0, 0]);
});

test('poison_val is written only where PAGE_POISON was negotiated', () => {
  const b = bench('a plain buffer', ALL, 1, [VIRTIO_BALLOON_F_REPORTING]);
  b.driver.writeConfig32(BALLOON_CFG_POISON_VAL, 0xaaaaaaaa);
  b.send(4, null, [[0x400000, 0x200000]]);
  expect(b.discarded).toEqual([[0x400, 0x200]]);
});

describe('queue numbering', () => {
  const shape = (features: readonly number[], numbering: 'compact' | 'spec'): number[] => [
    ...bench('a plain buffer', features, 1, features, numbering).device.queueMax,
  ];
  test('compact: an optional queue that is not offered has no index (mvm#3478)', () => {
    expect(shape([VIRTIO_BALLOON_F_REPORTING], 'compact').length).toBe(3);
    expect(shape([VIRTIO_BALLOON_F_STATS_VQ, VIRTIO_BALLOON_F_REPORTING], 'compact').length).toBe(4);
    expect(
      shape(
        [VIRTIO_BALLOON_F_STATS_VQ, VIRTIO_BALLOON_F_FREE_PAGE_HINT, VIRTIO_BALLOON_F_REPORTING],
        'compact',
      ).length,
    ).toBe(5);
  });
  test('spec: the numbers are fixed, and a missing queue has size 0', () => {
    expect(shape([VIRTIO_BALLOON_F_REPORTING], 'spec')).toEqual([128, 128, 0, 0, 128]);
  });
  test('a driver that declines a feature is still served on the others', () => {
    const b = bench('a plain buffer', [VIRTIO_BALLOON_F_PAGE_POISON, VIRTIO_BALLOON_F_REPORTING], 1, [
      VIRTIO_BALLOON_F_REPORTING,
    ]);
    b.send(2, null, [[0x400000, 0x200000]]);
    expect(b.discarded).toEqual([[0x400, 0x200]]);
  });
});

test('inflating gives the host its frames back, and a guest that touches the page again reads zero', () => {
  const host = testHost({ ramBytes: 16 * MiB, huge: 'never' });
  const [vcpu] = host.vcpus;
  const device = new BalloonDevice({
    port: { spawn: (name, body) => void host.tasks.spawn(name, body), now: () => 0, costs: COST_TABLE },
    memory: { ramPages: 4096, unitPages: 1, discard: (runs, n) => host.vm.discard(runs, n) },
  });
  const transport = new MmioTransport({ device, memory: host.vm.memory, interrupt: () => undefined });
  const driver = new MmioDriver(transport);
  driver.begin(VIRTIO_ID_BALLOON);
  const features = Features.of(VIRTIO_F_VERSION_1);
  driver.writeFeatures(features);
  driver.acceptFeatures(features);
  driver.setupQueue(0, QUEUE, rings(0));
  driver.driverOk();
  const ring = new RawRing(host.vm.memory, QUEUE, rings(0));
  ring.u32(BUFFER, 700);
  ring.desc(0, BUFFER, 4, 0);
  ring.avail(0);
  void ring.usedIdx;
  vcpu.enterGuest();
  vcpu.store32(gfn(700), 0, 5);
  vcpu.leaveGuest();
  const free = host.pool.buddy.free;
  driver.kick(0);
  while (host.poll());
  // The page, and the tables that mapped nothing else.
  expect(host.file.bmap(700)).toBe(-1);
  expect(host.pool.buddy.free).toBeGreaterThan(free);
  vcpu.enterGuest();
  expect(vcpu.load32(gfn(700), 0)).toBe(0);
  vcpu.leaveGuest();
  expect(host.pool.buddy.free).toBe(free);
});
