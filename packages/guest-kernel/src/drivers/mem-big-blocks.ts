/**
 * Big-block mode of the virtio-mem driver (`virtio_mem_bbm_*`): a device block spans one memory block or several, which
 * are added, put online, taken out of use and removed together.
 */
import { VIRTIO_MEM_REQ_PLUG, VIRTIO_MEM_REQ_UNPLUG } from '@ebb/virtio/uapi';
import type { MemoryHotplug } from '../mm/memory-hotplug.ts';
import {
  KERNEL,
  M_NODE,
  MOVABLE,
  OFFLINE,
  PLUGGED,
  UNUSED,
  type MemOutcome,
  type MemRegion,
} from './mem-region.ts';

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
      if (b >= r.usableEnd) return 'ENOSPC';
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
    const { sectionPages } = this.#hotplug;
    const node = r.w[r.base + M_NODE];
    // All memory blocks are added before the first is online: nothing of them is in use if one cannot be.
    for (let pfn = first; pfn < first + r.unit; pfn += sectionPages) {
      if (this.#hotplug.add(pfn, node)) continue;
      for (let p = first; p < pfn; p += sectionPages) this.#hotplug.remove(p, r.index);
      if (r.request(VIRTIO_MEM_REQ_UNPLUG, first, r.unit) !== 'ok') r.setState(block, PLUGGED);
      return 'ENOMEM';
    }
    for (let pfn = first; pfn < first + r.unit; pfn += sectionPages)
      this.#hotplug.online(pfn, r.index, (p) => r.isPlugged(p));
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
    for (let pfn = first; pfn < end; pfn += sectionPages) {
      if (this.#hotplug.fakeOffline(pfn, sectionPages)) continue;
      for (let p = first; p < pfn; p += sectionPages) this.#hotplug.fakeOnline(p, sectionPages);
      return 'EBUSY';
    }
    const outcome = r.request(VIRTIO_MEM_REQ_UNPLUG, first, r.unit);
    for (let pfn = first; pfn < end; pfn += sectionPages) {
      if (outcome === 'ok') this.#hotplug.remove(pfn, r.index);
      else this.#hotplug.fakeOnline(pfn, sectionPages);
    }
    if (outcome === 'ok') r.setState(block, UNUSED);
    return outcome;
  }
}
