/**
 * Sub-block mode of the virtio-mem driver (`virtio_mem_sbm_*`): memory blocks are added as soon as some of their
 * sub-blocks are plugged, and lose them again one by one where a whole block will not go.
 */
import { VIRTIO_MEM_REQ_PLUG, VIRTIO_MEM_REQ_UNPLUG } from '@ebb/virtio/uapi';
import type { MemoryHotplug } from '../mm/memory-hotplug.ts';
import {
  KERNEL,
  KERNEL_PARTIAL,
  MOVABLE,
  MOVABLE_PARTIAL,
  OFFLINE,
  OFFLINE_PARTIAL,
  PLUGGED,
  UNUSED,
  type MemOutcome,
  type MemRegion,
} from './mem-region.ts';

const PLUG_ORDER = [KERNEL_PARTIAL, MOVABLE_PARTIAL, OFFLINE_PARTIAL] as const;
const UNPLUG_ORDER = [OFFLINE_PARTIAL, OFFLINE, MOVABLE_PARTIAL, KERNEL_PARTIAL, MOVABLE, KERNEL] as const;

export class SubBlocks {
  readonly #region: MemRegion;
  readonly #hotplug: MemoryHotplug;

  constructor(region: MemRegion, hotplug: MemoryHotplug) {
    this.#region = region;
    this.#hotplug = hotplug;
  }

  /** Plugs `diff` pages: holes of partial blocks first, then unused blocks, then new ones. */
  plug(diff: number): MemOutcome {
    const r = this.#region;
    let left = Math.floor(diff / r.sub);
    if (left === 0) return 'ok';
    for (const state of PLUG_ORDER) {
      for (let b = r.firstBlock; b < r.nextBlock; b++) {
        if (r.state(b) !== state) continue;
        const outcome = this.#plugHoles(b, left);
        if (typeof outcome !== 'number') return outcome;
        left = outcome;
        if (left === 0) return 'ok';
      }
    }
    for (let b = r.firstBlock; b < r.nextBlock; b++) {
      if (r.state(b) !== UNUSED) continue;
      if (!r.mayAdd) return 'ENOSPC';
      const outcome = this.#plugAndAdd(b, left);
      if (typeof outcome !== 'number') return outcome;
      left = outcome;
      if (left === 0) return 'ok';
    }
    while (left > 0) {
      const b = r.nextBlock;
      if (b >= r.usableEnd || !r.mayAdd) return 'ENOSPC';
      r.nextBlock++;
      const outcome = this.#plugAndAdd(b, left);
      if (typeof outcome !== 'number') return outcome;
      left = outcome;
    }
    return 'ok';
  }

  /** Plugs up to `count` missing sub-blocks of a partial block, one request per run of them. What is left, or why not. */
  #plugHoles(block: number, count: number): number | MemOutcome {
    const r = this.#region;
    const { sub } = r;
    let left = count;
    const end = (block + 1) * r.unit;
    for (let pfn = block * r.unit; pfn < end && left > 0; ) {
      if (r.isPlugged(pfn)) {
        pfn += sub;
        continue;
      }
      let pages = 0;
      while (pages < left * sub && pfn + pages < end && !r.isPlugged(pfn + pages)) pages += sub;
      const outcome = r.request(VIRTIO_MEM_REQ_PLUG, pfn, pages);
      if (outcome !== 'ok') return outcome;
      if (this.#hotplug.isOnline(pfn)) this.#hotplug.fakeOnline(pfn, pages);
      left -= pages / sub;
      pfn += pages;
    }
    r.settle(block);
    return left;
  }

  /** Plugs the first sub-blocks of an unused block, adds it and puts it online. What is left, or why not. */
  #plugAndAdd(block: number, left: number): number | MemOutcome {
    const r = this.#region;
    const first = block * r.unit;
    const pages = Math.min(left * r.sub, r.unit);
    const outcome = r.request(VIRTIO_MEM_REQ_PLUG, first, pages);
    if (outcome !== 'ok') return outcome;
    if (!r.addAndOnline(first)) {
      // No memory for the memmap: what was plugged goes back (`virtio_mem_sbm_unplug_mb`).
      if (r.request(VIRTIO_MEM_REQ_UNPLUG, first, pages) !== 'ok') r.setState(block, PLUGGED);
      return 'ENOMEM';
    }
    r.settle(block);
    return left - pages / r.sub;
  }

  /** Unplugs `diff` pages, from the highest block down within each state. */
  unplug(diff: number): MemOutcome {
    const r = this.#region;
    let left = Math.floor(diff / r.sub);
    if (left === 0) return 'ok';
    for (const state of UNPLUG_ORDER) {
      for (let b = r.nextBlock - 1; b >= r.firstBlock && left > 0; b--) {
        if (r.state(b) !== state) continue;
        const outcome = this.#unplugFrom(b, left);
        if (typeof outcome !== 'number') return outcome;
        left = outcome;
      }
      if (left === 0) return 'ok';
    }
    return 'EBUSY';
  }

  /** Unplugs up to `count` sub-blocks of a block: whole if it may, else from its top. What is left, or why not. */
  #unplugFrom(block: number, count: number): number | MemOutcome {
    const r = this.#region;
    const { sub, unit } = r;
    const first = block * unit;
    const all = unit / sub;
    let left = count;
    if (left >= all && r.pluggedIn(block) === all) {
      const outcome = this.#unplugPages(first, unit);
      if (outcome === 'ok') left -= all;
      else if (outcome !== 'EBUSY') return outcome;
    }
    for (let pfn = first + unit - sub; pfn >= first && left > 0; pfn -= sub) {
      if (!r.isPlugged(pfn)) continue;
      const outcome = this.#unplugPages(pfn, sub);
      if (outcome === 'ok') left--;
      else if (outcome !== 'EBUSY') {
        r.settle(block);
        return outcome;
      }
    }
    if (r.pluggedIn(block) === 0) {
      this.#hotplug.remove(first, r.index);
      r.setState(block, UNUSED);
    } else r.settle(block);
    return left;
  }

  /** Takes pages out of use and unplugs them; if the device will not, they are put back to use. */
  #unplugPages(pfn: number, pages: number): MemOutcome {
    const online = this.#hotplug.isOnline(pfn);
    if (online && !this.#hotplug.fakeOffline(pfn, pages, true)) return 'EBUSY';
    const outcome = this.#region.request(VIRTIO_MEM_REQ_UNPLUG, pfn, pages);
    if (outcome !== 'ok' && online) this.#hotplug.fakeOnline(pfn, pages);
    return outcome;
  }

  /**
   * Empties sparse blocks into the holes of fuller ones, if the device trades (rows H44, H63): a memory block whose last
   * sub-block has gone gives its memmap back. Content moves elsewhere in the guest, a whole sub-block at a time: one page
   * that cannot go keeps all of it, where a balloon would trade page for page.
   */
  compact(): MemOutcome {
    const r = this.#region;
    const stuck = new Set<number>();
    for (;;) {
      const partial = this.#partialBlocks();
      const donor = partial.find((b) => !stuck.has(b));
      if (donor === undefined) return stuck.size > 0 ? 'EBUSY' : 'ok';
      const others = partial.filter((b) => b !== donor && r.state(b) === r.state(donor));
      const holes = others.reduce((sum, b) => sum + r.unit / r.sub - r.pluggedIn(b), 0);
      // Fuller ones would find no room either.
      if (holes < r.pluggedIn(donor)) return stuck.size > 0 ? 'EBUSY' : 'ok';
      const outcome = this.#empty(donor, others.toReversed());
      if (outcome === 'EBUSY') stuck.add(donor);
      else if (outcome !== 'ok') return outcome;
    }
  }

  /** Online blocks with holes, the emptiest first. */
  #partialBlocks(): number[] {
    const r = this.#region;
    const blocks = Array.from({ length: r.nextBlock - r.firstBlock }, (_, i) => r.firstBlock + i);
    return blocks
      .filter((b) => r.state(b) === KERNEL_PARTIAL || r.state(b) === MOVABLE_PARTIAL)
      .toSorted((a, b) => r.pluggedIn(a) - r.pluggedIn(b));
  }

  /** Trades every sub-block of `donor` for a hole in the first of `others` that has one, and removes it. */
  #empty(donor: number, others: readonly number[]): MemOutcome {
    const r = this.#region;
    const { sub, unit } = r;
    const first = donor * unit;
    for (let from = first + unit - sub; from >= first; from -= sub) {
      if (!r.isPlugged(from)) continue;
      const into = others.find((b) => r.pluggedIn(b) < unit / sub);
      if (into === undefined) return 'EBUSY';
      let to = into * unit;
      while (r.isPlugged(to)) to += sub;
      if (!this.#hotplug.fakeOffline(from, sub, true)) return 'EBUSY';
      const outcome = r.exchange(from, to, sub);
      this.#hotplug.fakeOnline(outcome === 'ok' ? to : from, sub);
      if (outcome !== 'ok') return outcome;
      r.settle(into);
    }
    this.#hotplug.remove(first, r.index);
    r.setState(donor, UNUSED);
    return 'ok';
  }
}
