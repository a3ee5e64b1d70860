/** The balloon driver against a scripted device: one test per MUST of virtio 1.4 § 5.5 that binds the driver. */
import { describe, expect, test, vi } from 'vitest';
import { NS_PER_S } from '@ebb/machine';
import {
  BALLOON_STAT_BYTES,
  VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
  VIRTIO_BALLOON_F_FREE_PAGE_HINT,
  VIRTIO_BALLOON_F_MUST_TELL_HOST,
  VIRTIO_BALLOON_F_PAGE_POISON,
  VIRTIO_BALLOON_F_REPORTING,
  VIRTIO_BALLOON_F_STATS_VQ,
  VIRTIO_F_INDIRECT_DESC,
} from '@ebb/virtio/uapi';
import { SHADOW_BALLOON, SHADOW_BUDDY, SHADOW_PCP } from '../mm/page.ts';
import { H_BALLOON_MUTEX } from '../layout.ts';
import { EV, eventRow, eventSum } from '../mm/events.ts';
import { Z_MANAGED, ZONE_DMA } from '../mm/zone.ts';
import { freePages, meminfo, pcpPages } from '../procfs.ts';
import type { TestGuest } from '../testing-guest.ts';
import { bring, bringDevice, Script, target } from './testing-balloon.ts';

const ALL = [
  VIRTIO_BALLOON_F_MUST_TELL_HOST,
  VIRTIO_BALLOON_F_STATS_VQ,
  VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
  VIRTIO_BALLOON_F_FREE_PAGE_HINT,
  VIRTIO_BALLOON_F_PAGE_POISON,
  VIRTIO_BALLOON_F_REPORTING,
];

describe('bring-up', () => {
  test('the driver declines INDIRECT_DESC, and PAGE_POISON unless it poisons; what it accepts it keeps', () => {
    const { device } = bring(ALL);
    expect(device.features.has(VIRTIO_F_INDIRECT_DESC)).toBe(false);
    expect(device.features.has(VIRTIO_BALLOON_F_PAGE_POISON)).toBe(false);
    expect(bring(ALL, true).device.features.has(VIRTIO_BALLOON_F_PAGE_POISON)).toBe(true);
  });
  test('The driver MUST populate the poison_val configuration data before setting the DRIVER_OK bit, and MUST NOT modify it after', () => {
    const { device, run } = bring(ALL, true);
    run(5);
    expect(device.writes.filter((w) => w.offset === 12)).toEqual([
      { offset: 12, value: 0xaaaaaaaa, driverOk: false },
    ]);
  });
  test('a reporting queue smaller than 32 fails the probe (ENOSPC), a smaller stats queue does not', () => {
    const probe = (queueMax: readonly number[], bits: readonly number[]): boolean => {
      class Small extends Script {
        override readonly queueMax = queueMax;
      }
      return bringDevice(new Small(bits)).guest.kernels[0].parts.balloon.ready;
    };
    expect(probe([128, 128, 16], [VIRTIO_BALLOON_F_REPORTING])).toBe(false);
    expect(probe([128, 128, 1], [VIRTIO_BALLOON_F_STATS_VQ])).toBe(true);
  });
});

describe('inflate and deflate', () => {
  test('buffers of 256 PFNs, descending inside one; actual moves with each (as observed)', () => {
    const { device, run } = bring([VIRTIO_BALLOON_F_MUST_TELL_HOST]);
    target(device, 1000);
    run(1);
    const sent = device.of(0).map((s) => new Uint32Array(s.readable.buffer));
    expect(sent.map((p) => p.length)).toEqual([256, 256, 256, 232]);
    let descending = 0;
    sent[2].forEach((pfn, i) => (descending += i > 0 && pfn < sent[2][i - 1] ? 1 : 0));
    expect(descending).toBeGreaterThan(200);
    expect(device.writes.filter((w) => w.offset === 4).map((w) => w.value)).toEqual([256, 512, 768, 1000]);
  });
  test('the driver MUST NOT use pages from the balloon after adding them, but before the device has acknowledged the inflate request', () => {
    const { device, guest, run } = bring([]);
    target(device, 256);
    run(1);
    const [sent] = device.of(0);
    // From the kick to the answer, which the driver awaits, each page is the balloon's.
    expect([...sent.states, ...sent.atAnswer]).toEqual(new Array(512).fill(SHADOW_BALLOON));
    expect(guest.log.total).toBe(0);
  });
  test('The driver MUST use the deflateq to inform the device; with MUST_TELL_HOST it MUST NOT use pages before the acknowledgement', () => {
    const { device, run } = bring([VIRTIO_BALLOON_F_MUST_TELL_HOST]);
    target(device, 512);
    run(1);
    target(device, 0);
    run(1);
    expect(device.of(1).length).toBe(2);
    // While the device held the buffer, every page was still the balloon's.
    for (const s of device.of(1))
      expect([...s.states, ...s.atAnswer]).toEqual(new Array(512).fill(SHADOW_BALLOON));
    const pages = device.of(1).flatMap((s) => [...new Uint32Array(s.readable.buffer)]);
    expect(pages.every((pfn) => [SHADOW_BUDDY, SHADOW_PCP].includes(device.state(pfn)))).toBe(true);
  });
  test('deflate is the exact reverse of inflate: last buffer first, ascending inside it', () => {
    const { device, run } = bring([]);
    target(device, 512);
    run(1);
    target(device, 0);
    run(1);
    const inflated = device.of(0).flatMap((s) => [...new Uint32Array(s.readable.buffer)]);
    const deflated = device.of(1).flatMap((s) => [...new Uint32Array(s.readable.buffer)]);
    expect(deflated).toEqual(inflated.toReversed());
  });
  test('The driver MUST NOT request deflation of pages before the device has acknowledged the inflate request', () => {
    const { device, run } = bring([]);
    let sentMeanwhile = -1;
    // The host changes its mind while it still holds the inflate buffer.
    device.meanwhile = () => {
      target(device, 0);
      sentMeanwhile = device.of(1).length;
    };
    target(device, 256);
    run(1);
    run(1);
    expect(sentMeanwhile).toBe(0);
    expect(device.seen.map((s) => s.queue)).toEqual([0, 1]);
    expect(device.of(0)[0].atAnswer).toHaveLength(256);
  });
  test('a page that is moved out of the way: the host is told of its successor first, and each zone counts its own', () => {
    const { device, guest, run } = bring([VIRTIO_BALLOON_F_MUST_TELL_HOST]);
    target(device, 300);
    run(1);
    const [kernel] = guest.kernels;
    const { w } = guest.arena;
    const [dma, dma32] = kernel.parts.zones;
    const managed = (): number[] => [dma, dma32].map((z) => w[z + Z_MANAGED]);
    const before = managed();
    const inside = device.of(0).flatMap((s) => [...new Uint32Array(s.readable.buffer)]);
    // From the middle of the list, above 16 MiB, to a page below.
    const from = inside[150];
    kernel.enter();
    const to = kernel.parts.alloc.alloc(0, 1, ZONE_DMA);
    expect([from >= 4096, to < 4096]).toEqual([true, true]);
    expect(kernel.parts.balloon.migrate(from, to)).toBe(true);
    expect(kernel.parts.balloon.migrate(from, to)).toBe(false);
    kernel.leave();
    expect(managed()).toEqual([before[0] - 1, before[1] + 1]);
    const told = device.seen.slice(-2).map((s) => [s.queue, ...new Uint32Array(s.readable.buffer)]);
    expect(told).toEqual([
      [0, to],
      [1, from],
    ]);
    expect([device.state(to), [SHADOW_BUDDY, SHADOW_PCP].includes(device.state(from))]).toEqual([
      SHADOW_BALLOON,
      true,
    ]);
    // The list is whole: all of it comes out.
    target(device, 0);
    run(1);
    const out = device.of(1).flatMap((s) => [...new Uint32Array(s.readable.buffer)]);
    expect(out.toSorted((a, b) => a - b)).toEqual([...inside, to].toSorted((a, b) => a - b));
    expect(guest.log.total).toBe(0);
  });
  test('The driver MUST update actual after changing the number of pages in the balloon', () => {
    const { device, run } = bring([]);
    target(device, 300);
    run(1);
    target(device, 100);
    run(1);
    expect(device.config[1]).toBe(100);
  });
  test('If DEFLATE_ON_OOM has not been negotiated, the driver MUST NOT use pages from the balloon; with it, the OOM notifier releases 256', () => {
    const exhaust = (bits: readonly number[]): number => {
      const { device, guest, run } = bring(bits);
      target(device, 4096);
      run(1);
      const [kernel] = guest.kernels;
      kernel.enter();
      device.writes.length = 0;
      while (kernel.parts.alloc.alloc(0, 0, 2) >= 0 && device.of(1).length < 3);
      kernel.leave();
      // The driver MUST update actual after changing the number of pages in the balloon.
      expect(device.writes.filter((write) => write.offset === 4).map((write) => write.value)).toEqual(
        device.of(1).map((_, i) => 4096 - 256 * (i + 1)),
      );
      expect(guest.log.total).toBe(0);
      return device.of(1).length;
    };
    expect(exhaust([])).toBe(0);
    expect(exhaust([VIRTIO_BALLOON_F_DEFLATE_ON_OOM])).toBe(3);
  });
  test('MemTotal shrinks with the balloon unless DEFLATE_ON_OOM (as observed)', () => {
    const total = (guest: TestGuest): number => Number(/MemTotal:\s+(\d+)/.exec(meminfo(guest.arena))?.[1]);
    const shrink = (bits: readonly number[]): number => {
      const { device, guest, run } = bring(bits);
      const before = total(guest);
      target(device, 1024);
      run(1);
      const shrunk = before - total(guest);
      target(device, 0);
      run(1);
      expect(total(guest)).toBe(before);
      return shrunk;
    };
    expect([shrink([]), shrink([VIRTIO_BALLOON_F_DEFLATE_ON_OOM])]).toEqual([4096, 0]);
  });
  test('out of puff: keeps what it has and tries again after 200 ms', () => {
    const { device, guest, run } = bring([]);
    target(device, 1_000_000);
    run(0.1);
    const first = device.config[1];
    expect(first).toBeGreaterThan(20_000);
    expect(guest.kernels[0].nextDue() - guest.kernels[0].vcpu.clock).toBeLessThanOrEqual(0.2 * NS_PER_S);
    expect(guest.log.total).toBe(0);
  });
  test('out of puff, five tries a second; the balloon’s own requests call no OOM notifier (GFP_NORETRY)', () => {
    const { device, guest, run } = bring([VIRTIO_BALLOON_F_DEFLATE_ON_OOM]);
    const { alloc } = guest.kernels[0].parts;
    let asked = 0;
    alloc.pressure = { ...alloc.pressure, outOfMemory: () => (asked++, 0) };
    target(device, 1_000_000);
    run(0.1);
    const before = eventSum(guest.arena, 'out_of_puff');
    run(1);
    expect(eventSum(guest.arena, 'out_of_puff') - before).toBe(5);
    expect([device.of(1), asked]).toEqual([[], 0]);
  });
});

describe('statistics', () => {
  test('After initializing the device, the driver MUST make an output buffer available in the statsq; at most one, at all times', () => {
    const { device, run } = bring([VIRTIO_BALLOON_F_STATS_VQ]);
    run(5);
    expect(device.of(2).length).toBe(1);
  });
  test('Upon detecting that the device has used it, the driver MUST make one available again, initialized, with the same subset', () => {
    const { device, guest, run } = bring([VIRTIO_BALLOON_F_STATS_VQ]);
    run(1);
    const { w } = guest.arena;
    w[eventRow(0) + EV.pgfault] = 7;
    w[eventRow(0) + EV.pgscan_kswapd] = 1;
    w[eventRow(0) + EV.pgscan_direct] = 2;
    w[eventRow(0) + EV.pgsteal_kswapd] = 3;
    w[eventRow(0) + EV.pgsteal_direct] = 4;
    device.returnStats();
    run(1);
    const [a, b] = device.of(2).map((s) => {
      const view = new DataView(s.readable.buffer);
      return Array.from({ length: s.readable.length / BALLOON_STAT_BYTES }, (_, i) =>
        view.getUint16(i * BALLOON_STAT_BYTES, true),
      );
    });
    expect(device.of(2).length).toBe(2);
    expect(b).toEqual(a);
    // As `update_balloon_stats` has them: memory, scanned or reclaimed pages too, in bytes.
    const value = (tag: number): number =>
      new DataView(device.of(2)[1].readable.buffer).getUint32(tag * BALLOON_STAT_BYTES + 2, true);
    expect([3, 12, 13, 14, 15].map(value)).toEqual([7, 1 * 4096, 2 * 4096, 3 * 4096, 4 * 4096]);
    // The specification's "multiple of 6" is its known defect: an entry is le16 + le64, 10 bytes.
    expect(a).toEqual(Array.from({ length: 16 }, (_, tag) => tag));
  });
});

describe('unbinding', () => {
  test('everything is deflated, then `actual` is written as 0 once, then the device is reset; bound again it fills again', () => {
    const { device, guest, run } = bring([VIRTIO_BALLOON_F_MUST_TELL_HOST]);
    const free = freePages(guest.arena) + pcpPages(guest.arena, 2);
    target(device, 1000);
    run(1);
    const [kernel] = guest.kernels;
    device.writes.length = 0;
    kernel.enter();
    kernel.parts.balloon.remove();
    kernel.leave();
    const deflated = device.of(1).map((s) => s.readable.length / 4);
    expect([deflated.reduce((a, b) => a + b, 0), Math.max(...deflated)]).toEqual([1000, 256]);
    expect(device.writes.map(({ offset, value }) => [offset, value])).toEqual([[4, 0]]);
    expect(freePages(guest.arena) + pcpPages(guest.arena, 2)).toBe(free);
    expect([kernel.parts.balloon.ready, guest.log.total]).toEqual([false, 0]);
    kernel.enter();
    expect(kernel.parts.balloon.reload()).toBe(true);
    kernel.leave();
    run(1);
    expect(kernel.parts.balloon.nrPages).toBe(1000);
  });
});

describe('interrupts', () => {
  test('statistics asked for while another CPU is in its OOM notifier are sent when it is out of it', () => {
    const { device, guest, run } = bring([VIRTIO_BALLOON_F_STATS_VQ]);
    run(1);
    expect(device.of(2)).toHaveLength(1);
    guest.arena.w[H_BALLOON_MUTEX] = 2;
    device.returnStats();
    expect(guest.registers.lines).not.toBe(0);
    guest.registers.lines = 0;
    const [kernel] = guest.kernels;
    kernel.enter();
    kernel.parts.balloon.interrupt();
    kernel.leave();
    expect(device.of(2)).toHaveLength(1);
    guest.arena.w[H_BALLOON_MUTEX] = 0;
    run(1);
    expect(device.of(2)).toHaveLength(2);
  });
});

describe('requests that come while another is answered', () => {
  test('statistics asked for again while the handler arms its interrupt are sent: no interrupt will come for them', () => {
    const { device, guest, run } = bring([VIRTIO_BALLOON_F_STATS_VQ]);
    run(1);
    const queue = guest.kernels[0].parts.balloon.queue(2);
    if (queue === null) throw new Error('statistics were negotiated');
    const arm = queue.enableInterrupts.bind(queue);
    vi.spyOn(queue, 'enableInterrupts').mockImplementationOnce((memory) => {
      device.returnStats();
      return arm(memory);
    });
    device.returnStats();
    run(1);
    expect(device.of(2)).toHaveLength(3);
  });
  test('a target that comes with the last completion of the one before is due at once', () => {
    const { device, guest, run } = bring([]);
    device.meanwhile = () => target(device, 0);
    target(device, 256);
    run(1);
    const [kernel] = guest.kernels;
    expect([kernel.parts.balloon.nrPages, device.of(0).length]).toEqual([0, 1]);
  });
});
