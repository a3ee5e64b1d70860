/**
 * An independent model of the virtio-mem driver in sub-block mode, 8 memory blocks of 4: written from the facts (states,
 * plug and unplug order, answers, timer), over plain arrays. For tests of this package. Not exported.
 */
import { MiB, PAGE_SIZE } from '@ebb/machine';
import {
  VIRTIO_MEM_REQ_PLUG as PLUG,
  VIRTIO_MEM_REQ_UNPLUG as UNPLUG,
  VIRTIO_MEM_RESP_ACK as ACK,
  VIRTIO_MEM_RESP_BUSY as BUSY,
  VIRTIO_MEM_RESP_NACK as NACK,
} from '@ebb/virtio/uapi';
import type { HotplugConfig } from '../boot.ts';
import type { MemOutcome } from './mem-region.ts';
import { BLOCK, type SeenRequest } from './testing-memory-device.ts';

export const SUBS = 4;
export const BLOCKS = 8;
export const SUB_PAGES: number = BLOCK / PAGE_SIZE;
const BOOT_MIB = 64;
export const BLOCK_MIB: number = (SUBS * BLOCK) / MiB;

/** Names by the driver's numbers. */
export const STATES = [
  'UNUSED',
  'PLUGGED',
  'OFFLINE',
  'OFFLINE_PARTIAL',
  'KERNEL',
  'KERNEL_PARTIAL',
  'MOVABLE',
  'MOVABLE_PARTIAL',
] as const;
type Where = 'none' | 'pending' | 'OFFLINE' | 'KERNEL' | 'MOVABLE';
export type Policy = HotplugConfig['policy'];

export class DriverModel {
  readonly plugged: boolean[] = Array.from({ length: BLOCKS * SUBS }, () => false);
  readonly where: Where[] = Array.from({ length: BLOCKS }, () => 'none');
  readonly pinned: Set<number> = new Set();
  readonly log: SeenRequest[] = [];
  requested = 0;
  retryMs = 50_000;
  armed = false;
  broken = false;
  outcome: MemOutcome = 'ok';
  /** Adds that are to find no memory. */
  starving = 0;
  /** Blocks that were ever prepared. */
  known = 0;
  readonly #policy: Policy;
  readonly #answer: (type: number) => number;
  readonly #offlineMax: number;

  constructor(policy: Policy, offlineMax: number, answer: (type: number) => number) {
    this.#policy = policy;
    // Two blocks at the least.
    this.#offlineMax = Math.max(2, offlineMax);
    this.#answer = answer;
  }

  count(block: number): number {
    return this.plugged.slice(block * SUBS, (block + 1) * SUBS).filter(Boolean).length;
  }
  state(block: number): (typeof STATES)[number] {
    const where = this.where[block];
    if (where === 'none') return 'UNUSED';
    if (where === 'pending') return 'PLUGGED';
    return this.count(block) === SUBS ? where : `${where}_PARTIAL`;
  }
  get total(): number {
    return this.plugged.filter(Boolean).length;
  }

  #request(type: number, block: number, count: number): MemOutcome {
    const answer = this.#answer(type);
    this.log.push({ type, block, count, answer });
    if (answer === ACK) {
      this.plugged.fill(type === PLUG, block, block + count);
      return 'ok';
    }
    if (answer === NACK && type === PLUG) return 'EAGAIN';
    return answer === BUSY ? 'ETXTBSY' : 'EINVAL';
  }

  // ── A pass ─────────────────────────────────────────────────────────────────────────────────────────────────────────

  pass(byTimer: boolean): void {
    if (this.broken) return;
    if (byTimer) this.retryMs = Math.min(300_000, 2 * this.retryMs);
    this.armed = false;
    do {
      this.outcome = this.#pending();
      if (this.outcome === 'ok') {
        const diff = this.requested - this.total;
        if (diff > 0) this.outcome = this.#plug(diff);
        if (diff < 0) this.outcome = this.#unplug(-diff);
      }
    } while (this.outcome === 'EAGAIN');
    if (this.outcome === 'ok') this.retryMs = 50_000;
    if (this.outcome === 'EINVAL') this.broken = true;
    this.armed = ['EBUSY', 'ETXTBSY', 'ENOMEM'].includes(this.outcome);
  }

  #pending(): MemOutcome {
    for (let b = 0; b < BLOCKS; b++) {
      if (this.where[b] !== 'pending') continue;
      const outcome = this.#request(UNPLUG, b * SUBS, this.count(b));
      if (outcome !== 'ok') return outcome;
      this.where[b] = 'none';
    }
    return 'ok';
  }

  #plug(want: number): MemOutcome {
    const goal = this.total + want;
    for (const state of ['KERNEL_PARTIAL', 'MOVABLE_PARTIAL', 'OFFLINE_PARTIAL'])
      for (let b = 0; b < BLOCKS; b++) {
        if (this.state(b) !== state) continue;
        for (let s = b * SUBS; s < (b + 1) * SUBS && this.total < goal; s++) {
          if (this.plugged[s]) continue;
          let n = 1;
          while (n < goal - this.total && s + n < (b + 1) * SUBS && !this.plugged[s + n]) n++;
          const outcome = this.#request(PLUG, s, n);
          if (outcome !== 'ok') return outcome;
        }
      }
    // Unused blocks, then new ones: both from the lowest up.
    for (let b = 0; this.total < goal; b++) {
      if (b >= BLOCKS) return 'ENOSPC';
      if (this.where[b] !== 'none') continue;
      if (this.where.filter((w) => w === 'OFFLINE').length + 1 > this.#offlineMax) return 'ENOSPC';
      this.known = Math.max(this.known, b + 1);
      const n = Math.min(SUBS, goal - this.total);
      const outcome = this.#request(PLUG, b * SUBS, n);
      if (outcome !== 'ok') return outcome;
      if (this.starving > 0) {
        this.starving--;
        if (this.#request(UNPLUG, b * SUBS, n) !== 'ok') this.where[b] = 'pending';
        return 'ENOMEM';
      }
      this.where[b] = this.#policy === 'offline' ? 'OFFLINE' : this.#zone();
    }
    return 'ok';
  }

  /** The kind of zone that the next block goes to. */
  #zone(): Where {
    if (this.#policy === 'online_movable') return 'MOVABLE';
    if (this.#policy !== 'auto-movable') return 'KERNEL';
    const mib = (w: Where): number => this.where.filter((x) => x === w).length * BLOCK_MIB;
    return mib('MOVABLE') + BLOCK_MIB <= 0.55 * (BOOT_MIB + mib('KERNEL')) ? 'MOVABLE' : 'KERNEL';
  }

  #unplug(want: number): MemOutcome {
    const goal = this.total - want;
    const order = ['OFFLINE_PARTIAL', 'OFFLINE', 'MOVABLE_PARTIAL', 'KERNEL_PARTIAL', 'MOVABLE', 'KERNEL'];
    for (const state of order)
      for (let b = BLOCKS - 1; b >= 0 && this.total > goal; b--) {
        if (this.state(b) !== state) continue;
        const outcome = this.#unplugBlock(b, goal);
        if (outcome !== 'ok') return outcome;
      }
    return this.total > goal ? 'EBUSY' : 'ok';
  }

  #unplugBlock(b: number, goal: number): MemOutcome {
    const first = b * SUBS;
    const stuck = (s: number): boolean => this.pinned.has(s);
    const whole = [0, 1, 2, 3].every((i) => this.plugged[first + i] && !stuck(first + i));
    if (whole && this.total - goal >= SUBS) {
      const outcome = this.#request(UNPLUG, first, SUBS);
      if (outcome !== 'ok') return outcome;
    }
    for (let s = first + SUBS - 1; s >= first && this.total > goal; s--) {
      if (!this.plugged[s] || stuck(s)) continue;
      const outcome = this.#request(UNPLUG, s, 1);
      if (outcome !== 'ok') return outcome;
    }
    if (this.count(b) === 0) this.where[b] = 'none';
    return 'ok';
  }

  // ── The administrator ──────────────────────────────────────────────────────────────────────────────────────────────

  /** False: it is not there, it is so already, or a page in it cannot go. True from `online`: half the limit is free again. */
  setOnline(b: number, online: boolean): boolean {
    const isOnline = this.where[b] === 'KERNEL' || this.where[b] === 'MOVABLE';
    if (online) {
      if (this.where[b] !== 'OFFLINE') return false;
      this.where[b] = this.#zone();
      return true;
    }
    if (!isOnline || [0, 1, 2, 3].some((i) => this.pinned.has(b * SUBS + i))) return false;
    this.where[b] = 'OFFLINE';
    return true;
  }
  get mayGoOn(): boolean {
    return 2 * this.where.filter((w) => w === 'OFFLINE').length <= this.#offlineMax;
  }
}
