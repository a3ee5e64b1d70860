/**
 * Free page hinting (`report_free_page_func` in virtio_balloon.c): while a migration runs, the driver hands the device what
 * is free, a block of 4 MiB at a time, and keeps it until the round is over or somebody needs it.
 *
 * The words are in the balloon's record and guarded by the balloon mutex, like the hint queue.
 */
import { gfn, type Vcpu } from '@ebb/machine';
import type { SplitDriverQueue } from '@ebb/virtio/driver';
import {
  BALLOON_CFG_FREE_PAGE_HINT_CMD_ID,
  FREE_PAGE_HINT_DONE,
  FREE_PAGE_HINT_STOP,
} from '@ebb/virtio/uapi';
import type { Arena } from '../arena.ts';
import { T_BALLOON } from '../layout.ts';
import { EV, eventRow } from '../mm/events.ts';
import { P_NEXT } from '../mm/page.ts';
import { GFP_NOWAIT, GFP_NO_KSWAPD, GFP_NORETRY, type PageAllocator } from '../mm/page-alloc.ts';
import { MIGRATE_MOVABLE } from '../mm/zone.ts';
import type { BalloonDriver } from './balloon.ts';
import { Q_HINT } from './virtio-guest.ts';

/** The command id that was followed last. */
const V_HINT_SEEN: number = T_BALLOON + 6;
/** First of the blocks held, newest first; −1 without any. */
const V_HINT_LIST: number = T_BALLOON + 7;
/** The page that a command is sent from. */
const V_HINT_PAGE: number = T_BALLOON + 11;
/** `VIRTIO_BALLOON_HINT_BLOCK_ORDER`: 4 MiB. */
const HINT_ORDER = 10;

export class FreePageHints {
  readonly #w: Int32Array;
  readonly #memmap: number;
  readonly #vcpu: Vcpu;
  readonly #alloc: PageAllocator;
  readonly #balloon: BalloonDriver;
  readonly #events: number;

  constructor(arena: Arena, vcpu: Vcpu, alloc: PageAllocator, balloon: BalloonDriver) {
    this.#w = arena.w;
    this.#memmap = arena.memmap;
    this.#vcpu = vcpu;
    this.#alloc = alloc;
    this.#balloon = balloon;
    this.#events = eventRow(vcpu.id);
  }

  /** The driver is bound: nothing is held, no command was followed. `page`: a guest page for commands. */
  begin(page: number): void {
    this.#w[V_HINT_SEEN] = 0;
    this.#w[V_HINT_LIST] = -1;
    this.#w[V_HINT_PAGE] = page;
  }

  get page(): number {
    return this.#w[V_HINT_PAGE];
  }

  /**
   * Follows the host's command id: a new one starts a round, DONE releases the blocks held, STOP likewise. A round ends
   * early when the host's id is another: the config interrupt that told of it brings us back here. Under the mutex.
   */
  follow(): void {
    const w = this.#w;
    const { guest } = this.#balloon;
    const queue = this.#balloon.queue(Q_HINT);
    if (queue === null) return;
    const id = this.#command();
    if (id === w[V_HINT_SEEN]) return;
    w[V_HINT_SEEN] = id;
    if (id === FREE_PAGE_HINT_STOP || id === FREE_PAGE_HINT_DONE) {
      this.release();
      return;
    }
    this.#send(queue, id);
    while (this.#command() === id) {
      const pfn = this.#alloc.alloc(
        HINT_ORDER,
        MIGRATE_MOVABLE,
        3 | GFP_NORETRY | GFP_NOWAIT | GFP_NO_KSWAPD,
      );
      if (pfn < 0) break;
      w[this.#memmap + (pfn << 4) + P_NEXT] = w[V_HINT_LIST];
      w[V_HINT_LIST] = pfn;
      for (let i = 0; i < 1 << HINT_ORDER; i++) this.#alloc.unstamp(pfn + i);
      queue.add(this.#vcpu, [], [{ gpa: pfn * 4096, length: 4096 << HINT_ORDER }], 0);
      guest.submitAndWait(queue, this.#balloon.deviceQueue(Q_HINT));
      w[this.#events + EV.hinted_pages] += 1 << HINT_ORDER;
    }
    this.#send(queue, FREE_PAGE_HINT_STOP);
  }

  #command(): number {
    return this.#balloon.guest.driver.readConfig32(BALLOON_CFG_FREE_PAGE_HINT_CMD_ID) | 0;
  }

  #send(queue: SplitDriverQueue, id: number): void {
    this.#vcpu.store32(gfn(this.page), 0, id);
    queue.add(this.#vcpu, [{ gpa: this.page * 4096, length: 4 }], [], 0);
    this.#balloon.guest.submitAndWait(queue, this.#balloon.deviceQueue(Q_HINT));
  }

  /** Frees all that is held. Under the mutex. */
  release(): void {
    while (this.#releaseBlock() > 0);
  }

  /**
   * The shrinker: one block goes back to who needs memory (`shrink_free_pages`); pages freed. Any vCPU. The host may have
   * been told that it is free: what is written there is dirty again.
   */
  shrink(): number {
    if (!this.#balloon.ready || this.#w[V_HINT_LIST] < 0 || !this.#balloon.lockForMemory()) return 0;
    const freed = this.#releaseBlock();
    this.#balloon.unlock();
    return freed;
  }

  /** Frees the block taken last; pages freed. */
  #releaseBlock(): number {
    const w = this.#w;
    const pfn = w[V_HINT_LIST];
    if (pfn < 0) return 0;
    w[V_HINT_LIST] = w[this.#memmap + (pfn << 4) + P_NEXT];
    this.#alloc.free(pfn, HINT_ORDER);
    return 1 << HINT_ORDER;
  }
}
