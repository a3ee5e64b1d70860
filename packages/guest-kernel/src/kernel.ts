/**
 * One vCPU's view of its guest's kernel: the allocator, page cache, reclaim and drivers over the shared arena, and the
 * kernel threads that run between a program's steps.
 *
 * Threads are explicit state machines with their state in the arena. The balloon and reporting run on vCPU 0; kswapd of
 * a node on the first vCPU of that node; the flusher anywhere. Interrupts are taken between steps and in device waits.
 */
import { assert, hash2, NS_PER_S, type Vcpu } from '@ebb/machine';
import { Arena } from './arena.ts';
import { bootMemory, zoneBases, type GuestConfig } from './boot.ts';
import { BALLOON_PAGES, BalloonDriver } from './drivers/balloon.ts';
import { BlkDriver } from './drivers/blk.ts';
import { PageReporting } from './drivers/reporting.ts';
import { LINE_ACPI, LINE_BALLOON } from './drivers/virtio-guest.ts';
import { AcpiMemory } from './drivers/acpi-memory.ts';
import { MEM_DRIVER_PAGES, VirtioMemDriver } from './drivers/virtio-mem.ts';
import { CPU_BASE, CPU_NEXT_VMSTAT_F64, CPU_WORDS, H_BOOTED } from './layout.ts';
import { Buddy } from './mm/buddy.ts';
import { Lru } from './mm/lru.ts';
import { MemoryHotplug } from './mm/memory-hotplug.ts';
import { PageAllocator } from './mm/page-alloc.ts';
import { PageCache, type BlockMap } from './mm/page-cache.ts';
import { PerCpuPages } from './mm/per-cpu-pages.ts';
import { Processes } from './mm/process.ts';
import { Reclaim } from './mm/reclaim.ts';
import { EV, eventRow } from './mm/events.ts';
import { MIGRATE_UNMOVABLE, PAGEBLOCK_ORDER, Z_NODE } from './mm/zone.ts';

/** Highest zone for kernel memory: Normal. */
const KERNEL_GFP = 2;
/** `vmstat_update` interval, at which idle per-CPU lists shrink. */
const VMSTAT_INTERVAL = NS_PER_S;

export class GuestKernel {
  readonly arena: Arena;
  readonly vcpu: Vcpu;
  readonly config: GuestConfig;
  #parts: Parts | null = null;

  constructor(config: GuestConfig, arenaBuffer: SharedArrayBuffer, vcpu: Vcpu) {
    this.arena = new Arena(arenaBuffer, config.maxPfn);
    this.vcpu = vcpu;
    this.config = config;
  }

  /** True once vCPU 0 has booted the guest. */
  get booted(): boolean {
    return Atomics.load(this.arena.w, H_BOOTED) !== 0;
  }

  /** Boots the guest. vCPU 0 only, in guest mode, with nothing else running in this guest. */
  boot(): void {
    assert(this.vcpu.id === 0, 'vCPU 0 boots');
    bootMemory(this.arena, this.vcpu, this.config);
    const parts = this.#build();
    this.#parts = parts;
    parts.pcp.enter();
    const takePages = (n: number): number[] =>
      Array.from({ length: n }, () => {
        const pfn = parts.alloc.alloc(0, MIGRATE_UNMOVABLE, KERNEL_GFP);
        assert(pfn >= 0, 'a booting guest has pages for its drivers');
        this.vcpu.zeroPages(pfn as never, 1);
        parts.alloc.unstamp(pfn);
        return pfn;
      });
    if (this.config.blk) parts.blk.probe(takePages(4));
    if (this.config.balloon && parts.balloon.probe(takePages(BALLOON_PAGES))) parts.reporting.notifyFree();
    for (const driver of parts.mem) driver.probe(takePages(MEM_DRIVER_PAGES));
    parts.acpi?.probe();
    parts.pcp.leave();
    // Publishes the booted arena. Pairs with the load in `booted`.
    Atomics.store(this.arena.w, H_BOOTED, 1);
  }

  /** The kernel's parts as this vCPU sees them; only after boot. */
  get parts(): Parts {
    this.#parts ??= this.#build();
    return this.#parts;
  }

  #build(): Parts {
    const { arena, vcpu, config } = this;
    const zones = zoneBases(arena.w);
    const buddy = new Buddy(arena, vcpu);
    const pcp = new PerCpuPages(arena, buddy, vcpu, zones);
    const alloc = new PageAllocator(arena, vcpu, buddy, pcp, zones, config);
    const processes = new Processes(arena, vcpu, alloc, config.nrCpus, config.initOnAlloc, () =>
      pcp.serveDrainRequest(),
    );
    const inWait = (): void => {
      pcp.serveDrainRequest();
      processes.shootdown.serve();
    };
    const blk = new BlkDriver(arena, vcpu, inWait);
    const lru = new Lru(arena, vcpu);
    const cache = new PageCache(arena, vcpu, lru, alloc, zones, blk, blockMap(config));
    const reclaim = new Reclaim(arena, vcpu, lru, cache, alloc, zones);
    const balloon = new BalloonDriver(arena, vcpu, alloc, zones, config.pagePoison, inWait);
    const reporting = new PageReporting(arena, vcpu, buddy, zones, balloon, config.reportingOrder);
    buddy.onLargeFree = () => reporting.notifyFree();
    buddy.largeOrder = config.reportingOrder ?? PAGEBLOCK_ORDER;
    alloc.onLastPut = (pfn) => {
      const node = cache.nodeOf(pfn);
      lru.lock(node);
      lru.remove(node, pfn);
      lru.unlock(node);
    };
    const mem: VirtioMemDriver[] = [];
    let acpi: AcpiMemory | null = null;
    if (config.hotplug !== undefined) {
      const hotplug = new MemoryHotplug(
        arena,
        vcpu,
        buddy,
        pcp,
        alloc,
        cache,
        processes,
        zones,
        config.hotplug,
        config.cpuNode,
        config.initOnAlloc,
      );
      const { balloonCompaction = false } = config;
      balloon.miscounts = balloonCompaction === 'miscounts';
      if (balloonCompaction !== false) hotplug.balloon = balloon;
      for (let i = 0; i < config.hotplug.devices; i++)
        mem.push(new VirtioMemDriver(arena, vcpu, hotplug, config.hotplug, i, inWait));
      acpi = new AcpiMemory(arena, vcpu, hotplug, config.hotplug.dimms ?? 0);
    }
    alloc.pressure = {
      wakeKswapd: (zone, highest) => reclaim.wakeKswapd(zone, highest),
      reclaim: (node) => reclaim.direct(node) + balloon.hints.shrink(),
      outOfMemory: () => {
        let freed = balloon.oomNotify();
        for (const driver of mem) freed += driver.oomNotify();
        return freed;
      },
    };
    // A node without CPUs has its kswapd on vCPU 0.
    const nodes = [...new Set(zones.map((z) => arena.w[z + Z_NODE]))].filter(
      (node) => Math.max(0, config.cpuNode.indexOf(node)) === vcpu.id,
    );
    return {
      zones,
      buddy,
      pcp,
      alloc,
      blk,
      lru,
      cache,
      reclaim,
      balloon,
      reporting,
      mem,
      acpi,
      processes,
      kswapdNodes: nodes,
    };
  }

  /** Begins a slice: guest mode, and the lease on this CPU's page lists. */
  enter(): void {
    this.vcpu.enterGuest();
    this.parts.pcp.enter();
    // What was asked while it was away: before any translation is used.
    this.parts.processes.shootdown.serve();
  }

  /** Ends a slice. */
  leave(): void {
    this.parts.pcp.leave();
    this.vcpu.leaveGuest();
  }

  /** Takes interrupts and runs the kernel threads that are due. Between program steps. */
  runDue(until: number): void {
    const { balloon, reporting, reclaim, pcp, mem, acpi, kswapdNodes } = this.parts;
    const { vcpu } = this;
    pcp.serveDrainRequest();
    this.parts.processes.shootdown.serve();
    const lines = vcpu.takeInterrupts();
    if (vcpu.id === 0) {
      if ((lines & (1 << LINE_BALLOON)) !== 0 || balloon.guest.interruptTaken) {
        balloon.guest.interruptTaken = false;
        balloon.interrupt();
      }
      if (balloon.nextDue(vcpu.clock) <= vcpu.clock) balloon.work(until);
      if (reporting.nextDue() <= vcpu.clock) reporting.pass();
      for (const driver of mem) {
        if ((lines & (1 << driver.guest.line)) !== 0 || driver.guest.interruptTaken) {
          driver.guest.interruptTaken = false;
          driver.interrupt();
        }
        if (driver.nextDue(vcpu.clock) <= vcpu.clock) driver.work();
      }
      if ((lines & (1 << LINE_ACPI)) !== 0) acpi?.interrupt();
      if (acpi?.pending === true) acpi.work();
    }
    for (const node of kswapdNodes) if (reclaim.kswapdPending(node)) reclaim.kswapd(node);
    reclaim.flusher();
    // A deferrable timer: it wakes no idle CPU, which then does what it has missed.
    const { f64 } = this.arena;
    const timer = (CPU_BASE + vcpu.id * CPU_WORDS + CPU_NEXT_VMSTAT_F64) / 2;
    if (f64[timer] === 0) f64[timer] = VMSTAT_INTERVAL;
    if (vcpu.clock >= f64[timer]) {
      let missed = Math.floor((vcpu.clock - f64[timer]) / VMSTAT_INTERVAL);
      f64[timer] = vcpu.clock + VMSTAT_INTERVAL;
      while (pcp.decay() && missed-- > 0);
    }
  }

  /** Virtual time at which a kernel thread of this vCPU is due; Infinity when none is. */
  nextDue(): number {
    const { balloon, reporting, reclaim, mem, acpi, kswapdNodes } = this.parts;
    const now = this.vcpu.clock;
    let due = Number.POSITIVE_INFINITY;
    if (this.vcpu.id === 0) {
      due = Math.min(balloon.nextDue(now), reporting.nextDue());
      for (const driver of mem) due = Math.min(due, driver.nextDue(now));
      // An interrupt that a driver took while it waited for a buffer is still to be handled.
      const taken = balloon.guest.interruptTaken || mem.some((driver) => driver.guest.interruptTaken);
      if (taken || acpi?.pending === true) due = now;
    }
    for (const node of kswapdNodes) if (reclaim.kswapdPending(node)) due = Math.min(due, now);
    return due;
  }

  /** Adds to one of this CPU's event counters. */
  count(event: keyof typeof EV, by: number): void {
    this.arena.w[eventRow(this.vcpu.id) + EV[event]] += by;
  }
}

interface Parts {
  readonly zones: readonly number[];
  readonly buddy: Buddy;
  readonly pcp: PerCpuPages;
  readonly alloc: PageAllocator;
  readonly blk: BlkDriver;
  readonly lru: Lru;
  readonly cache: PageCache;
  readonly reclaim: Reclaim;
  readonly balloon: BalloonDriver;
  readonly reporting: PageReporting;
  /** One per memory device; they work on vCPU 0. */
  readonly mem: readonly VirtioMemDriver[];
  /** DIMMs in slots, where memory can be added at all. */
  readonly acpi: AcpiMemory | null;
  readonly processes: Processes;
  /** Nodes whose kswapd runs on this vCPU. */
  readonly kswapdNodes: readonly number[];
}

function blockMap(config: GuestConfig): BlockMap {
  const { blocks } = config;
  if (blocks.kind === 'hash') return (inode, index) => hash2(inode, index) % blocks.nrBlocks;
  return (inode, index) => inode * blocks.pagesPerFile + index;
}
