/**
 * The virtio-blk driver: batches of page-sized reads and writes through indirect descriptor tables. Counterpart:
 * `drivers/block/virtio_blk.c`.
 *
 * One page holds 32 request slots of 128 bytes: a table of three descriptors, the header and the status byte. The blk
 * mutex guards queue and slots and is held across the wait; it is a sleeping lock, so no spin lock is held meanwhile.
 */
import { spinLock, spinUnlock, type Vcpu } from '@ebb/machine';
import type { SplitDriverQueue } from '@ebb/virtio/driver';
import {
  BLK_HEADER_BYTES,
  DESC_BYTES,
  Features,
  SECTORS_PER_PAGE,
  VIRTIO_BLK_F_FLUSH,
  VIRTIO_BLK_S_OK,
  VIRTIO_BLK_T_FLUSH,
  VIRTIO_BLK_T_IN,
  VIRTIO_BLK_T_OUT,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_INDIRECT_DESC,
  VIRTIO_F_VERSION_1,
  VIRTIO_ID_BLOCK,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
} from '@ebb/virtio/uapi';
import type { Arena } from '../arena.ts';
import { H_BLK_MUTEX, T_BLK } from '../layout.ts';
import type { BlockIo } from '../mm/page-cache.ts';
import { Q_BLK, VirtioGuest, LINE_BLK } from './virtio-guest.ts';

/** Words of the driver's state: ready, then ring pages, the slot page. */
const B_READY = 0;
const B_FEATURES_LOW = 1;
const B_FEATURES_HIGH = 2;
const B_SIZE = 3;
const B_RINGS = 4;
const B_SLOTS = 7;

const SLOT_BYTES = 128;
const NR_SLOTS = 32;
const SLOT_HEADER = 64;
const SLOT_STATUS = 96;
const QUEUE_SIZE = 256;

export class BlkDriver implements BlockIo {
  readonly #w: Int32Array;
  readonly #guest: VirtioGuest;
  readonly #vcpu: Vcpu;
  readonly #relax: () => void;
  /** Tables and tokens of one batch, slot by slot. */
  readonly #tables = new Float64Array(NR_SLOTS);
  readonly #tokens: Int32Array = Int32Array.from({ length: NR_SLOTS }, (_, slot) => slot);
  #queue: SplitDriverQueue | null = null;

  constructor(arena: Arena, vcpu: Vcpu, inWait: () => void) {
    this.#w = arena.w;
    this.#vcpu = vcpu;
    this.#guest = new VirtioGuest(arena, vcpu, LINE_BLK, inWait);
    this.#relax = () => {
      inWait();
      vcpu.beginSection();
      vcpu.port.relax();
    };
  }

  /** Brings the device up (vCPU 0, at boot). `pages` are four zeroed guest pages. False: no such device. */
  probe(pages: readonly number[]): boolean {
    const w = this.#w;
    const { driver } = this.#guest;
    const features = this.#guest.negotiate(
      VIRTIO_ID_BLOCK,
      Features.of(VIRTIO_BLK_F_FLUSH, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1),
    );
    if (features === null) return false;
    w[T_BLK + B_FEATURES_LOW] = features.low;
    w[T_BLK + B_FEATURES_HIGH] = features.high;
    for (let i = 0; i < 4; i++) w[T_BLK + B_RINGS + i] = pages[i];
    const max = driver.queueMax(0);
    if (!max.ok) return false;
    w[T_BLK + B_SIZE] = Math.min(QUEUE_SIZE, max.value);
    const queue = this.#view();
    queue.reset(this.#vcpu);
    if (!driver.setupQueue(0, queue.size, queue.rings).ok) return false;
    driver.driverOk();
    Atomics.store(w, T_BLK + B_READY, 1);
    return true;
  }

  #view(): SplitDriverQueue {
    this.#queue ??= this.#guest.queue(
      Q_BLK,
      this.#w[T_BLK + B_SIZE],
      T_BLK + B_RINGS,
      new Features(this.#w[T_BLK + B_FEATURES_LOW], this.#w[T_BLK + B_FEATURES_HIGH]),
    );
    return this.#queue;
  }

  get ready(): boolean {
    return Atomics.load(this.#w, T_BLK + B_READY) !== 0;
  }

  transfer(write: boolean, pfns: Int32Array, blocks: Float64Array, count: number): boolean {
    if (!this.ready) return false;
    spinLock(this.#w, H_BLK_MUTEX, this.#vcpu.id, this.#relax);
    const queue = this.#view();
    let ok = true;
    const batch = Math.min(NR_SLOTS, queue.size);
    for (let done = 0; done < count; done += batch) {
      const n = Math.min(batch, count - done);
      for (let i = 0; i < n; i++) {
        this.#fillSlot(
          i,
          write ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN,
          blocks[done + i] * SECTORS_PER_PAGE,
          pfns[done + i],
        );
      }
      ok = this.#run(queue, n, 3) && ok;
    }
    spinUnlock(this.#w, H_BLK_MUTEX);
    return ok;
  }

  flush(): boolean {
    if (!this.ready) return false;
    spinLock(this.#w, H_BLK_MUTEX, this.#vcpu.id, this.#relax);
    const queue = this.#view();
    this.#fillSlot(0, VIRTIO_BLK_T_FLUSH, 0, -1);
    const ok = this.#run(queue, 1, 2);
    spinUnlock(this.#w, H_BLK_MUTEX);
    return ok;
  }

  #slotGpa(slot: number): number {
    return this.#w[T_BLK + B_SLOTS] * 4096 + slot * SLOT_BYTES;
  }

  /** Writes table, header and status of one slot. The data page `pfn` is −1 for a request without data. */
  #fillSlot(slot: number, type: number, sector: number, pfn: number): void {
    const gpa = this.#slotGpa(slot);
    const vcpu = this.#vcpu;
    vcpu.window(gpa, SLOT_BYTES, true);
    const at = vcpu.at >> 2;
    const i32 = vcpu.i32;
    const desc = (index: number, address: number, length: number, flags: number): void => {
      const d = at + (index * DESC_BYTES) / 4;
      i32[d] = address | 0;
      i32[d + 1] = Math.floor(address / 0x1_0000_0000);
      i32[d + 2] = length;
      i32[d + 3] = flags | ((flags & VIRTQ_DESC_F_NEXT) !== 0 ? (index + 1) << 16 : 0);
    };
    desc(0, gpa + SLOT_HEADER, BLK_HEADER_BYTES, VIRTQ_DESC_F_NEXT);
    if (pfn >= 0)
      desc(1, pfn * 4096, 4096, VIRTQ_DESC_F_NEXT | (type === VIRTIO_BLK_T_IN ? VIRTQ_DESC_F_WRITE : 0));
    desc(pfn >= 0 ? 2 : 1, gpa + SLOT_STATUS, 1, VIRTQ_DESC_F_WRITE);
    const header = at + SLOT_HEADER / 4;
    i32[header] = type;
    i32[header + 1] = 0;
    i32[header + 2] = sector | 0;
    i32[header + 3] = Math.floor(sector / 0x1_0000_0000);
    i32[at + SLOT_STATUS / 4] = 0xff;
  }

  /** Submits the requests in the first `n` slots, of `descriptors` each, and waits for them; true if every status is OK. */
  #run(queue: SplitDriverQueue, n: number, descriptors: number): boolean {
    for (let slot = 0; slot < n; slot++) this.#tables[slot] = this.#slotGpa(slot);
    this.#guest.submitTables(queue, 0, this.#tables, this.#tokens, n, descriptors);
    let ok = true;
    for (let i = 0; i < n; i++) {
      const slot = this.#guest.waitUsed(queue);
      this.#vcpu.window(this.#slotGpa(slot) + SLOT_STATUS, 1, false);
      ok = this.#vcpu.u8[this.#vcpu.at] === VIRTIO_BLK_S_OK && ok;
    }
    this.#guest.settle();
    // After the interrupt is handled, it is acknowledged (§ 4.2.3.4.1).
    this.#guest.driver.takeInterrupt();
    return ok;
  }
}
