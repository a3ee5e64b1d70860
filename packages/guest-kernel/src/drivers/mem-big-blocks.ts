/**
 * Big-block mode of the virtio-mem driver (`virtio_mem_bbm_*`): a device block spans one memory block or several, which
 * are added, put online, taken out of use and removed together.
 */
import { VIRTIO_MEM_REQ_PLUG, VIRTIO_MEM_REQ_UNPLUG } from '@ebb/virtio/uapi';
import type { MemoryHotplug } from '../mm/memory-hotplug.ts';
import { KERNEL, MOVABLE, OFFLINE, PLUGGED, UNUSED, type MemOutcome, type MemRegion } from './mem-region.ts';

export class BigBlocks {
  readonly #region: MemRegion;
  readonly #hotplug: MemoryHotplug;

  constructor(region: MemRegion, hotplug: MemoryHotplug) {
    this.#region = region;
    this.#hotplug = hotplug;
  }

  /** Plugs `diff` pages: unused blocks first, then new ones. */
  plug(diff: number): MemOutcome {
    const r = this.#region;
    for (let left = Math.floor(diff / r.unit); left > 0; left--) {
      let b = r.firstBlock;
      while (b < r.nextBlock && r.state(b) !== UNUSED) b++;
      if (b >= r.usableEnd || !r.mayAdd) return 'ENOSPC';
      r.nextBlock = Math.max(r.nextBlock, b + 1);
      const outcome = this.#plugBlock(b);
      if (outcome !== 'ok') return outcome;
    }
    return 'ok';
  }

  #plugBlock(block: number): MemOutcome {
    const r = this.#region;
    const first = block * r.unit;
    const outcome = r.request(VIRTIO_MEM_REQ_PLUG, first, r.unit);
    if (outcome !== 'ok') return outcome;
    if (!r.addAndOnline(first)) {
      if (r.request(VIRTIO_MEM_REQ_UNPLUG, first, r.unit) !== 'ok') r.setState(block, PLUGGED);
      return 'ENOMEM';
    }
    r.settle(block);
    return 'ok';
  }

  /** Unplugs `diff` pages, from the highest block down within each state. */
  unplug(diff: number): MemOutcome {
    const r = this.#region;
    let left = Math.floor(diff / r.unit);
    for (const state of [OFFLINE, MOVABLE, KERNEL] as const) {
      for (let b = r.nextBlock - 1; b >= r.firstBlock && left > 0; b--) {
        if (r.state(b) !== state) continue;
        const outcome = this.#unplugBlock(b);
        if (outcome === 'ok') left--;
        else if (outcome !== 'EBUSY') return outcome;
      }
    }
    return left === 0 ? 'ok' : 'EBUSY';
  }

  #unplugBlock(block: number): MemOutcome {
    const r = this.#region;
    const first = block * r.unit;
    const end = first + r.unit;
    const { sectionPages } = this.#hotplug;
    const backInUse = (p: number): void => {
      if (this.#hotplug.isOnline(p)) this.#hotplug.fakeOnline(p, sectionPages);
    };
    for (let pfn = first; pfn < end; pfn += sectionPages) {
      if (!this.#hotplug.isOnline(pfn) || this.#hotplug.fakeOffline(pfn, sectionPages, true)) continue;
      for (let p = first; p < pfn; p += sectionPages) backInUse(p);
      return 'EBUSY';
    }
    const outcome = r.request(VIRTIO_MEM_REQ_UNPLUG, first, r.unit);
    for (let pfn = first; pfn < end; pfn += sectionPages) {
      if (outcome === 'ok') this.#hotplug.remove(pfn, r.index);
      else backInUse(pfn);
    }
    if (outcome === 'ok') r.setState(block, UNUSED);
    return outcome;
  }
}
