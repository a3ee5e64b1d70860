/**
 * The virtio-mem driver, as Linux 6.12 behaves (`drivers/virtio/virtio_mem.c`): a region of guest-physical memory whose
 * blocks are plugged to reach the size the host asks for, and unplugged as far as their content lets them go.
 *
 * **Sub-block mode** where the device's block is smaller than a memory block: a memory block is plugged by sub-blocks of
 * at least a pageblock; a block with some of them missing is *partial*. **Big-block mode** else: whole device blocks.
 *
 * | to plug | to unplug |
 * | --- | --- |
 * | kernel partial, movable partial, offline partial, unused, then new blocks; ascending | offline partial, offline, movable partial, kernel partial, movable, kernel; descending; a full online block first whole, then by sub-blocks from its top |
 *
 * Blocks are OFFLINE under policy `offline`, and where an administrator says so (`setBlockOnline`).
 *
 * One pass runs to completion on vCPU 0, so its clock may run ahead of the window by what the requests cost.
 */
import { NS_PER_S, spinLock, spinUnlock, trySpinLock, type Vcpu } from '@ebb/machine';
import {
  EBB_MEM_F_EXCHANGE,
  EBB_MEM_F_MORE,
  EBB_MEM_REQ_MORE,
  Features,
  MEM_CFG_ADDR,
  MEM_CFG_BLOCK_SIZE,
  MEM_CFG_NODE_ID,
  MEM_QUEUE_REQUEST,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_INDIRECT_DESC,
  VIRTIO_F_VERSION_1,
  VIRTIO_ID_MEM,
  VIRTIO_MEM_F_ACPI_PXM,
  VIRTIO_MEM_F_PERSISTENT_SUSPEND,
  VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE,
} from '@ebb/virtio/uapi';
import type { Arena } from '../arena.ts';
import type { HotplugConfig } from '../boot.ts';
import { MEM_THREAD_WORDS, T_MEM } from '../layout.ts';
import type { MemoryHotplug } from '../mm/memory-hotplug.ts';
import { BigBlocks } from './mem-big-blocks.ts';
import {
  M_ADDR,
  M_BLOCK,
  M_BROKEN,
  M_FEATURES_HIGH,
  M_FEATURES_LOW,
  M_LAST,
  M_MUTEX,
  M_PLUGGED,
  M_READY,
  M_REQUESTED,
  M_REQUEST_PAGE,
  M_RETRY_F64,
  M_RETRY_MS,
  M_RINGS,
  M_SIZE,
  M_UNPLUG_ALL,
  M_WORK,
  MEM_OUTCOMES,
  MemRegion,
  PLUGGED,
  type MemOutcome,
} from './mem-region.ts';
import { SubBlocks } from './mem-sub-blocks.ts';
import type { VirtioGuest } from './virtio-guest.ts';

/** What the guest asks for when it runs out: 64 MiB at once. */
const MORE_PAGES = 16384;

const RETRY_MIN_MS = 50_000;
const RETRY_MAX_MS = 300_000;

/** Guest pages the driver of one device needs: three for the queue, one for requests. */
export const MEM_DRIVER_PAGES = 4;

export class VirtioMemDriver {
  readonly #region: MemRegion;
  readonly #subBlocks: SubBlocks;
  readonly #bigBlocks: BigBlocks;
  readonly #w: Int32Array;
  readonly #f64: Float64Array;
  readonly #base: number;
  readonly #vcpu: Vcpu;
  readonly #hotplug: MemoryHotplug;
  readonly #config: HotplugConfig;
  readonly #relax: () => void;

  /** `index`: which memory device, from 0. */
  constructor(
    arena: Arena,
    vcpu: Vcpu,
    hotplug: MemoryHotplug,
    config: HotplugConfig,
    index: number,
    inWait: () => void,
  ) {
    this.#region = new MemRegion(arena, vcpu, hotplug, index, inWait);
    this.#subBlocks = new SubBlocks(this.#region, hotplug);
    this.#bigBlocks = new BigBlocks(this.#region, hotplug);
    this.#w = arena.w;
    this.#f64 = arena.f64;
    this.#base = this.#region.base;
    this.#vcpu = vcpu;
    this.#hotplug = hotplug;
    this.#config = config;
    this.#relax = () => {
      inWait();
      vcpu.beginSection();
      vcpu.port.relax();
    };
  }

  /** The driver's side of its device. */
  get guest(): VirtioGuest {
    return this.#region.guest;
  }

  // ── Bring-up ─────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Brings the device up on vCPU 0. `pages`: `MEM_DRIVER_PAGES` zeroed guest pages. False: no such device. */
  probe(pages: readonly number[]): boolean {
    const w = this.#w;
    const base = this.#base;
    const region = this.#region;
    const { driver } = region.guest;
    const features = region.guest.negotiate(
      VIRTIO_ID_MEM,
      Features.of(
        VIRTIO_MEM_F_ACPI_PXM,
        VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE,
        VIRTIO_MEM_F_PERSISTENT_SUSPEND,
        EBB_MEM_F_EXCHANGE,
        EBB_MEM_F_MORE,
        VIRTIO_F_INDIRECT_DESC,
        VIRTIO_F_EVENT_IDX,
        VIRTIO_F_VERSION_1,
      ),
    );
    if (features === null) return false;
    w[base + M_FEATURES_LOW] = features.low;
    w[base + M_FEATURES_HIGH] = features.high;
    for (let i = 0; i < 3; i++) w[base + M_RINGS + i] = pages[i];
    w[base + M_REQUEST_PAGE] = pages[3];
    const max = driver.queueMax(MEM_QUEUE_REQUEST);
    // A request has two parts, and no chain may be longer than the queue (§ 2.7.5.3.1), though Linux makes one.
    if (!max.ok || max.value < 2) return false;
    w[base + M_SIZE] = Math.min(128, max.value);
    const { queue } = region;
    queue.reset(this.#vcpu);
    if (!driver.setupQueue(MEM_QUEUE_REQUEST, queue.size, queue.rings).ok) return false;
    w[base + M_BLOCK] = region.field(MEM_CFG_BLOCK_SIZE);
    // Without ACPI_PXM the field means nothing.
    const node = features.has(VIRTIO_MEM_F_ACPI_PXM) ? driver.readConfig32(MEM_CFG_NODE_ID) & 0xffff : 0;
    w[base + M_ADDR] = region.field(MEM_CFG_ADDR);
    region.refresh();
    region.forget();
    this.#hotplug.registerGroup(region.index, node, region.unit);
    w[base + M_RETRY_MS] = RETRY_MIN_MS;
    driver.driverOk();
    if (this.#config.adopts !== 'no') this.#adopt();
    else if (w[base + M_PLUGGED] > 0) w[base + M_UNPLUG_ALL] = 1;
    Atomics.store(w, base + M_WORK, 1);
    Atomics.store(w, base + M_READY, 1);
    return true;
  }

  /** The region begins with what is plugged, without holes; it is used as it is. */
  #adopt(): void {
    const region = this.#region;
    const { unit, firstBlock } = region;
    const first = firstBlock * unit;
    const end = this.#w[this.#base + M_ADDR] + this.#w[this.#base + M_PLUGGED];
    if (end > first) region.setPlugged(first, end - first, true);
    for (let b = firstBlock; b * unit < end; b++) {
      region.nextBlock = b + 1;
      if (this.#adoptUnit(b * unit)) region.settle(b);
      else region.setState(b, PLUGGED);
    }
  }

  /** One unit, of as many memory blocks as it has; false: there is no memory for the memmap of one. */
  #adoptUnit(first: number): boolean {
    const region = this.#region;
    if (this.#config.adopts !== 'in-place') return region.addAndOnline(first);
    for (let pfn = first; pfn < first + region.unit; pfn += this.#hotplug.sectionPages)
      this.#hotplug.adopt(pfn, region.index);
    return true;
  }

  get ready(): boolean {
    return this.#region.ready;
  }

  /**
   * The module goes (`rmmod`): what is plugged stays as it is, and nobody listens to the device any more. On vCPU 0. With
   * the mutex, as `cancel_work_sync`: who waits for an answer has it before the device is reset.
   */
  remove(): void {
    if (!this.ready) return;
    spinLock(this.#w, this.#base + M_MUTEX, this.#vcpu.id, this.#relax);
    Atomics.store(this.#w, this.#base + M_READY, 0);
    this.#region.guest.driver.reset();
    spinUnlock(this.#w, this.#base + M_MUTEX);
  }

  /** It comes back (`insmod`). False: memory that it added is still there, which Linux refuses to take over. On vCPU 0. */
  reload(): boolean {
    if (this.ready || this.#region.anyAdded) return false;
    const w = this.#w;
    const pages = [M_RINGS, M_RINGS + 1, M_RINGS + 2, M_REQUEST_PAGE].map((word) => w[this.#base + word]);
    return this.probe(pages);
  }

  // ── Interrupts and timers ────────────────────────────────────────────────────────────────────────────────────────

  /** The device's interrupt, on vCPU 0. */
  interrupt(): void {
    this.#region.interrupt();
  }

  /** Virtual time at which there is work; Infinity when there is none. On vCPU 0. */
  nextDue(now: number): number {
    if (!this.ready || this.#region.broken) return Number.POSITIVE_INFINITY;
    if (this.#region.workPending) return now;
    const at = this.#f64[(this.#base + M_RETRY_F64) / 2];
    return at > 0 ? Math.max(at, now) : Number.POSITIVE_INFINITY;
  }

  #armRetry(): void {
    const w = this.#w;
    this.#f64[(this.#base + M_RETRY_F64) / 2] =
      this.#vcpu.clock + (w[this.#base + M_RETRY_MS] / 1000) * NS_PER_S;
  }

  // ── The worker ───────────────────────────────────────────────────────────────────────────────────────────────────

  /** One pass towards the requested size (`virtio_mem_run_wq`). On vCPU 0, when due. */
  work(): void {
    if (!this.ready || this.#region.broken) return;
    if (!trySpinLock(this.#w, this.#base + M_MUTEX, this.#vcpu.id)) return;
    this.#pass(false);
    spinUnlock(this.#w, this.#base + M_MUTEX);
  }

  /** The OOM notifier: asks the host for more, and plugs what it grants, never less; pages gained. Any vCPU. */
  oomNotify(): number {
    const w = this.#w;
    const base = this.#base;
    if (!this.ready || !this.#region.features.has(EBB_MEM_F_MORE) || this.#region.broken) return 0;
    if (Atomics.load(w, base + M_MUTEX) === this.#vcpu.id + 1) return 0;
    spinLock(w, base + M_MUTEX, this.#vcpu.id, this.#relax);
    const before = w[base + M_PLUGGED];
    const asked = Math.max(MORE_PAGES, w[base + M_BLOCK]);
    // It may have been removed while we waited for the mutex.
    if (this.ready && this.#region.request(EBB_MEM_REQ_MORE, w[base + M_ADDR], asked) === 'ok')
      this.#pass(true);
    const gained = w[base + M_PLUGGED] - before;
    spinUnlock(w, base + M_MUTEX);
    return Math.max(0, gained);
  }

  /**
   * What an administrator writes to a memory block's `state` (`/sys/devices/system/memory/memoryN/state`); `pfn` is the
   * block's first page. False: there is no such block, it is so already, or some of its pages cannot go. Any vCPU.
   */
  setBlockOnline(pfn: number, online: boolean): boolean {
    const region = this.#region;
    if (!region.holds(pfn)) return false;
    spinLock(this.#w, this.#base + M_MUTEX, this.#vcpu.id, this.#relax);
    let done = this.#hotplug.isAdded(pfn) && this.#hotplug.isOnline(pfn) !== online;
    if (done && online) region.online(pfn);
    else if (done) done = region.offline(pfn);
    if (done) region.settle(Math.floor(pfn / region.unit));
    // Half of what may be offline is enough to go on adding.
    if (done && online && 2 * region.offlinePages <= region.offlineThreshold)
      Atomics.store(this.#w, this.#base + M_WORK, 1);
    spinUnlock(this.#w, this.#base + M_MUTEX);
    return done;
  }

  #pass(plugOnly: boolean): void {
    const w = this.#w;
    const base = this.#base;
    const region = this.#region;
    const mode = region.bigBlocks ? this.#bigBlocks : this.#subBlocks;
    const timer = (base + M_RETRY_F64) / 2;
    if (!region.workPending && this.#f64[timer] > 0)
      w[base + M_RETRY_MS] = Math.min(RETRY_MAX_MS, 2 * w[base + M_RETRY_MS]);
    this.#f64[timer] = 0;
    let outcome: MemOutcome;
    let leftOver = false;
    do {
      leftOver = false;
      // Before the sizes are read: a change after that is seen by the next request, or by the next pass.
      Atomics.store(w, base + M_WORK, 0);
      outcome = w[base + M_UNPLUG_ALL] === 0 ? 'ok' : region.unplugAll();
      if (outcome === 'ok') {
        region.refresh();
        outcome = region.unplugPending();
      }
      if (outcome === 'ok') {
        const diff = w[base + M_REQUESTED] - w[base + M_PLUGGED];
        if (diff > 0) outcome = mode.plug(diff);
        else if (diff < 0 && !plugOnly) outcome = mode.unplug(-diff);
        else leftOver = diff < 0;
        const trades = region.features.has(EBB_MEM_F_EXCHANGE) && !region.bigBlocks && !plugOnly;
        if (outcome === 'ok' && trades) outcome = this.#subBlocks.compact();
      }
    } while (outcome === 'EAGAIN');
    // What this pass was not to do is left for the next, on vCPU 0.
    if (leftOver) Atomics.store(w, base + M_WORK, 1);
    w[base + M_LAST] = MEM_OUTCOMES.indexOf(outcome);
    switch (outcome) {
      case 'ok':
        w[base + M_RETRY_MS] = RETRY_MIN_MS;
        break;
      case 'ENOSPC':
        // Nothing to wait for but a larger usable region, which the device announces.
        break;
      case 'EINVAL':
        Atomics.store(w, base + M_BROKEN, 1);
        break;
      case 'EBUSY':
      case 'ETXTBSY':
      case 'ENOMEM':
        this.#armRetry();
    }
  }
}

/** Why the last pass of memory device `index` stopped, read from outside. */
export function memoryOutcome(arena: Arena, index: number): MemOutcome {
  return MEM_OUTCOMES[arena.w[T_MEM + index * MEM_THREAD_WORDS + M_LAST]];
}
