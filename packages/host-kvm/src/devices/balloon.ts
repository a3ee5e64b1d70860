/**
 * The traditional memory balloon, device 5 (virtio 1.2 § 5.5), features 0–5.
 *
 * Inflate: each PFN's page goes back to the host; the buffer is returned only after zap, flush and free (I3b). Deflate
 * frees nothing: the next touch faults a frame in. Reporting discards whole ranges; unaligned parts are skipped, never
 * rounded outward, and nothing is discarded while `poison_val` is set or the balloon is inhibited. Hinting collects a
 * bitmap for migration and touches no page. The balloon enforces nothing (H33): a guest that reuses an inflated page
 * just gets memory again; such pages are counted by comparing the balloon's own bitmap with what is backed.
 *
 * On a backing of fixed large pages a page is freed only when all of its 4 KiB parts are in the balloon; the parts are
 * kept in a bitmap that a reset empties.
 */
import { Bitmap } from '@ebb/machine';
import {
  BALLOON_CFG_ACTUAL,
  BALLOON_CFG_BYTES,
  BALLOON_CFG_POISON_VAL,
  BALLOON_STAT_BYTES,
  BALLOON_STAT_NAMES,
  Features,
  FREE_PAGE_HINT_DONE,
  FREE_PAGE_HINT_FIRST_ID,
  FREE_PAGE_HINT_STOP,
  VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
  VIRTIO_BALLOON_F_FREE_PAGE_HINT,
  VIRTIO_BALLOON_F_MUST_TELL_HOST,
  VIRTIO_BALLOON_F_PAGE_POISON,
  VIRTIO_BALLOON_F_REPORTING,
  VIRTIO_BALLOON_F_STATS_VQ,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_INDIRECT_DESC,
  VIRTIO_F_VERSION_1,
  VIRTIO_ID_BALLOON,
  type BalloonStatName,
} from '@ebb/virtio/uapi';
import type { DescriptorChain, DeviceHost, SplitDeviceQueue, VirtioDevice } from '@ebb/virtio/device';
import type { TaskYield } from '../host-tasks.ts';
import { DeviceTimeline, QueueRunner, type DevicePort, type DiscardPort } from './device-port.ts';

export type BalloonQueue = 'inflate' | 'deflate' | 'stats' | 'hint' | 'reporting';
export type BalloonStats = Partial<Record<BalloonStatName, number>>;

export interface BalloonDeviceOptions {
  readonly port: DevicePort;
  readonly memory: DiscardPort;
  /** Device-specific feature bits to offer; all of 0–5 by default. */
  readonly features?: readonly number[];
  /**
   * `compact`: an optional queue that is not offered has no index (QEMU, and what every Linux driver expects);
   * `spec`: the specification's fixed numbers 0–4.
   */
  readonly numbering?: 'compact' | 'spec';
  /** Told of the pages in the balloon when the driver writes their number. */
  readonly onActual?: (pages: number) => void;
  /** Told of every event as QEMU's trace lines name them. */
  readonly trace?: (line: string) => void;
}

export interface BalloonCounters {
  inflatedPages: number;
  deflatedPages: number;
  reportedRanges: number;
  reportedPages: number;
  reportRequests: number;
  skippedRanges: number;
  discardedPages: number;
  badPfns: number;
  statsUpdates: number;
  hintedPages: number;
  staleHints: number;
  descriptors: number;
}

/** Rounds of free page hinting, as QEMU names them. */
type HintState = 'stop' | 'requested' | 'start' | 'done';

const ALL_FEATURES = [
  VIRTIO_BALLOON_F_MUST_TELL_HOST,
  VIRTIO_BALLOON_F_STATS_VQ,
  VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
  VIRTIO_BALLOON_F_FREE_PAGE_HINT,
  VIRTIO_BALLOON_F_PAGE_POISON,
  VIRTIO_BALLOON_F_REPORTING,
];

export class BalloonDevice implements VirtioDevice {
  readonly deviceId: number = VIRTIO_ID_BALLOON;
  readonly offered: Features;
  readonly configBytes: number = BALLOON_CFG_BYTES;
  readonly queueMax: readonly number[];
  readonly counters: BalloonCounters = {
    inflatedPages: 0,
    deflatedPages: 0,
    reportedRanges: 0,
    reportedPages: 0,
    reportRequests: 0,
    skippedRanges: 0,
    discardedPages: 0,
    badPfns: 0,
    statsUpdates: 0,
    hintedPages: 0,
    staleHints: 0,
    descriptors: 0,
  };
  /** Pages the guest has put in and not taken out: the device's own book, by PFN. */
  readonly ballooned: Bitmap;
  /** No discards while a device with pinned memory is attached. */
  inhibited = false;
  /** Newest statistics, by QEMU's names, and whether any have come. */
  stats: BalloonStats = {};
  /** Config fields. */
  numPages = 0;
  actual = 0;
  hintCommandId: number = FREE_PAGE_HINT_STOP;
  poisonValue = 0;

  readonly #roles: (BalloonQueue | null)[];
  readonly #memory: DiscardPort;
  readonly #port: DevicePort;
  readonly #runner: QueueRunner;
  readonly #timeline = new DeviceTimeline();
  readonly #trace: ((line: string) => void) | undefined;
  readonly #onActual: ((pages: number) => void) | undefined;
  #features: Features = new Features(0, 0);
  #host: DeviceHost | null = null;
  #queues: readonly (SplitDeviceQueue | null)[] = [];
  /** The one stats buffer the driver keeps with us. */
  #statsChain: DescriptorChain | null = null;
  /** 4 KiB parts of large host pages that are in the balloon, where the backing's unit is larger than a page. */
  readonly #partial: Bitmap;
  #hintState: HintState = 'stop';
  #nextHintId: number = FREE_PAGE_HINT_FIRST_ID;
  #hintBitmap: Bitmap | null = null;

  constructor(options: BalloonDeviceOptions) {
    const bits = options.features ?? ALL_FEATURES;
    this.offered = Features.of(...bits, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1);
    const optional: [BalloonQueue, number][] = [
      ['stats', VIRTIO_BALLOON_F_STATS_VQ],
      ['hint', VIRTIO_BALLOON_F_FREE_PAGE_HINT],
      ['reporting', VIRTIO_BALLOON_F_REPORTING],
    ];
    const roles: (BalloonQueue | null)[] = ['inflate', 'deflate'];
    for (const [role, bit] of optional) {
      if (this.offered.has(bit)) roles.push(role);
      else if (options.numbering === 'spec') roles.push(null);
    }
    this.#roles = roles;
    this.queueMax = roles.map((role) => (role === null ? 0 : 128));
    this.#memory = options.memory;
    this.#port = options.port;
    this.#trace = options.trace;
    this.#onActual = options.onActual;
    const { ramPages, unitPages, endPfn = ramPages } = options.memory;
    this.ballooned = new Bitmap(endPfn);
    this.#partial = new Bitmap(unitPages > 1 ? endPfn : 0);
    this.#runner = new QueueRunner(options.port, 'balloon', (index, kicked) => this.#serve(index, kicked));
  }

  attach(host: DeviceHost): void {
    this.#host = host;
  }

  activate(queues: readonly (SplitDeviceQueue | null)[], features: Features): void {
    this.#queues = queues;
    this.#features = features;
  }

  kick(index: number): void {
    this.#runner.kick(index);
  }

  get idle(): boolean {
    return this.#runner.idle;
  }

  /** Device reset: buffers are forgotten, and so are half-ballooned host pages (QEMU lost this in 2019). */
  reset(): void {
    this.#queues = [];
    this.#statsChain = null;
    this.#features = new Features(0, 0);
    this.poisonValue = 0;
    this.actual = 0;
    this.ballooned.clear();
    this.#partial.clear();
    this.#hintState = 'stop';
    this.#hintBitmap = null;
    this.hintCommandId = FREE_PAGE_HINT_STOP;
  }

  // ── Configuration ────────────────────────────────────────────────────────────────────────────────────────────────

  readConfig(offset: number, width: number, features: Features): number {
    const words = [
      this.numPages,
      this.actual,
      features.has(VIRTIO_BALLOON_F_FREE_PAGE_HINT) ? this.hintCommandId : 0,
      features.has(VIRTIO_BALLOON_F_PAGE_POISON) ? this.poisonValue : 0,
    ];
    if (offset === 0)
      this.#trace?.(`virtio_balloon_get_config num_pages: ${this.numPages} actual: ${this.actual}`);
    return (words[offset >> 2] >>> (8 * (offset & 3))) & (width === 4 ? 0xffffffff : (1 << (8 * width)) - 1);
  }

  /** `actual` and, with PAGE_POISON, `poison_val` are the driver's; the rest is read-only. Narrow writes are ignored. */
  writeConfig(offset: number, width: number, value: number, features: Features): void {
    if (width !== 4) return;
    if (offset === BALLOON_CFG_ACTUAL) {
      this.#trace?.(`virtio_balloon_set_config actual: ${value >>> 0} oldactual: ${this.actual}`);
      this.actual = value >>> 0;
      this.#onActual?.(this.actual);
    } else if (offset === BALLOON_CFG_POISON_VAL && features.has(VIRTIO_BALLOON_F_PAGE_POISON))
      this.poisonValue = value >>> 0;
  }

  /**
   * Asks the guest for a logical size of `bytes`; sizes above RAM mean no balloon. Returns before anything is done. The
   * guest is told even if it was asked before: after an OOM deflate that is what fills the balloon again.
   */
  setTarget(bytes: number): void {
    const ramBytes = this.#memory.ramPages * 4096;
    const size = Math.max(0, Math.min(bytes, ramBytes));
    this.numPages = Math.floor((ramBytes - size) / 4096);
    this.#trace?.(
      `virtio_balloon_to_target balloon target: 0x${size.toString(16)} num_pages: ${this.numPages}`,
    );
    this.#host?.configChanged();
  }

  // ── Queues ───────────────────────────────────────────────────────────────────────────────────────────────────────

  *#serve(index: number, kicked: number): Generator<TaskYield, void, void> {
    const queue = this.#queues[index];
    const role = this.#roles[index];
    if (queue === undefined || queue === null || role === undefined || role === null) return;
    do {
      queue.disableKicks();
      for (;;) {
        const chain = queue.pop();
        if (chain === null) break;
        this.counters.descriptors += chain.segments;
        if (role === 'stats') {
          this.#receiveStats(queue, index, chain);
          yield undefined;
          continue;
        }
        const cost = yield* this.#handle(role, chain);
        // Others have their turn after each buffer: a guest may add them as fast as we take them.
        yield undefined;
        // A reset meanwhile took the buffer back.
        if (this.#queues[index] !== queue) return;
        this.#host?.completes(this.#timeline.complete(kicked, cost + this.#port.costs.queueRoundTripNs));
        queue.push(chain, 0);
        this.#host?.queueInterrupt(index);
      }
      if (queue.error !== null) {
        this.#host?.needsReset(queue.error.kind);
        return;
      }
    } while (queue.enableKicks());
  }

  /** Carries one buffer out; its virtual cost. Returns only when every discard it asks for is complete (I3b). */
  *#handle(role: Exclude<BalloonQueue, 'stats'>, chain: DescriptorChain): Generator<TaskYield, number, void> {
    switch (role) {
      case 'inflate':
        return yield* this.#inflate(chain);
      case 'deflate':
        return yield* this.#deflate(chain);
      case 'hint':
        return this.#hint(chain);
      case 'reporting':
        return yield* this.#report(chain);
    }
  }

  /** PFNs of the readable part from byte `offset`, at most a chunk of them; those that are not in RAM end them. */
  #pfns(chain: DescriptorChain, offset: number): Uint32Array {
    const left = chain.readableBytes - offset;
    const bytes = new Uint8Array(Math.min(left - (left % 4), PFN_CHUNK_BYTES));
    const read = chain.read(offset, bytes);
    return new Uint32Array(bytes.buffer, 0, Math.floor(read / 4));
  }

  *#inflate(chain: DescriptorChain): Generator<TaskYield, number, void> {
    let cost = 0;
    for (let offset = 0; offset < chain.readableBytes; offset += PFN_CHUNK_BYTES) {
      // A discard yields, but there may be nothing to discard.
      if (offset > 0) yield undefined;
      cost += yield* this.#inflatePages(this.#pfns(chain, offset).toSorted());
    }
    return cost;
  }

  *#inflatePages(pfns: Uint32Array): Generator<TaskYield, number, void> {
    const runs: number[] = [];
    const unit = this.#memory.unitPages;
    let last = -1;
    for (const pfn of pfns) {
      if (pfn === last) continue;
      last = pfn;
      if (pfn >= this.ballooned.length) {
        this.counters.badPfns++;
        continue;
      }
      // A page that is in already may have been touched since, and has memory again: it goes back like the others.
      if (this.ballooned.add(pfn)) this.counters.inflatedPages++;
      if (unit === 1) appendPage(runs, pfn, 1);
      else if (this.#partial.add(pfn)) {
        const base = pfn - (pfn % unit);
        let whole = true;
        for (let i = 0; i < unit && whole; i++) whole = this.#partial.has(base + i);
        if (!whole) continue;
        for (let i = 0; i < unit; i++) this.#partial.delete(base + i);
        appendPage(runs, base, unit);
      }
    }
    return yield* this.#discard(runs);
  }

  *#deflate(chain: DescriptorChain): Generator<TaskYield, number, void> {
    for (let offset = 0; offset < chain.readableBytes; offset += PFN_CHUNK_BYTES) {
      if (offset > 0) yield undefined;
      for (const pfn of this.#pfns(chain, offset)) {
        if (pfn >= this.ballooned.length) {
          this.counters.badPfns++;
          continue;
        }
        if (this.ballooned.delete(pfn)) this.counters.deflatedPages++;
        if (this.#partial.length > 0) this.#partial.delete(pfn);
      }
    }
    return this.#port.costs.exitNs;
  }

  *#report(chain: DescriptorChain): Generator<TaskYield, number, void> {
    this.counters.reportRequests++;
    const ranges: [gfn: number, count: number][] = [];
    for (let i = chain.readableSegments; i < chain.segments; i++) {
      const gpa = chain.gpas[i];
      const length = chain.lengths[i];
      // The content must survive when a poison value was promised, and DMA-pinned memory cannot go.
      const unitBytes = this.#memory.unitPages * 4096;
      if (this.inhibited || this.poisonValue !== 0 || gpa % unitBytes !== 0 || length % unitBytes !== 0) {
        this.counters.skippedRanges++;
        continue;
      }
      this.counters.reportedRanges++;
      this.counters.reportedPages += length / 4096;
      ranges.push([gpa / 4096, length / 4096]);
    }
    ranges.sort((a, b) => a[0] - b[0]);
    const runs: number[] = [];
    for (const [gfn, count] of ranges)
      if (runs.length === 0 || gfn >= runs[runs.length - 2] + runs[runs.length - 1])
        appendPage(runs, gfn, count);
    return yield* this.#discard(runs);
  }

  *#discard(runs: readonly number[]): Generator<TaskYield, number, void> {
    if (runs.length === 0 || this.inhibited) return this.#port.costs.exitNs;
    const freed = yield* this.#memory.discard(Int32Array.from(runs), runs.length / 2);
    this.counters.discardedPages += freed;
    return (runs.length / 2) * this.#port.costs.discardLeafNs;
  }

  // ── Statistics ───────────────────────────────────────────────────────────────────────────────────────────────────

  /**
   * The driver's buffer arrives with fresh figures; we keep it until we want the next ones. Unknown tags are ignored. A
   * second one, which no driver sends, takes the first one's place.
   */
  #receiveStats(queue: SplitDeviceQueue, index: number, chain: DescriptorChain): void {
    if (this.#statsChain !== null) {
      queue.push(this.#statsChain, 0);
      this.#host?.queueInterrupt(index);
    }
    const bytes = new Uint8Array(Math.min(chain.readableBytes, 4096));
    const read = chain.read(0, bytes);
    const view = new DataView(bytes.buffer);
    const stats: BalloonStats = {};
    for (let at = 0; at + BALLOON_STAT_BYTES <= read; at += BALLOON_STAT_BYTES) {
      const name = BALLOON_STAT_NAMES[view.getUint16(at, true)];
      if (name !== undefined)
        stats[name] = view.getUint32(at + 2, true) + view.getUint32(at + 6, true) * 0x1_0000_0000;
    }
    this.stats = stats;
    this.counters.statsUpdates++;
    this.#statsChain = chain;
  }

  /** Asks for fresh statistics by returning the driver's buffer; false if we do not hold it. */
  requestStats(completesAt?: number): boolean {
    const index = this.#roles.indexOf('stats');
    const queue = this.#queues[index];
    const chain = this.#statsChain;
    if (queue === undefined || queue === null || chain === null) return false;
    this.#statsChain = null;
    if (completesAt !== undefined) this.#host?.completes(completesAt);
    queue.push(chain, 0);
    this.#host?.queueInterrupt(index);
    return true;
  }

  // ── Free page hinting ────────────────────────────────────────────────────────────────────────────────────────────

  /** Starts a round: a new command id. Pages hinted under it collect in the bitmap of `stopHinting`. */
  startHinting(): boolean {
    if (!this.#features.has(VIRTIO_BALLOON_F_FREE_PAGE_HINT)) return false;
    this.#hintBitmap = new Bitmap(this.ballooned.length);
    this.hintCommandId = this.#nextHintId;
    this.#nextHintId = this.#nextHintId === 0xffff_ffff ? FREE_PAGE_HINT_FIRST_ID : this.#nextHintId + 1;
    this.#hintState = 'requested';
    this.#host?.configChanged();
    return true;
  }

  /**
   * Ends the round: the guest may use hinted pages for good. Returns those hinted, one bit per PFN; none without a round, or
   * if the device was reset in it.
   */
  stopHinting(): Bitmap {
    const hinted = this.#hintBitmap;
    if (hinted === null) return new Bitmap(this.ballooned.length);
    this.#hintBitmap = null;
    this.hintCommandId = FREE_PAGE_HINT_DONE;
    this.#hintState = 'done';
    this.#host?.configChanged();
    return hinted;
  }

  #hint(chain: DescriptorChain): number {
    if (chain.readableBytes >= 4) {
      const [id] = this.#pfns(chain, 0);
      if (id === this.hintCommandId && this.#hintState === 'requested') this.#hintState = 'start';
      else {
        // STOP, or an id that is not the round's: what follows does not belong to it.
        if (this.#hintState === 'start') this.#hintState = 'stop';
        if (id !== FREE_PAGE_HINT_STOP) this.counters.staleHints++;
      }
    }
    if (this.#hintState === 'start') {
      for (let i = chain.readableSegments; i < chain.segments; i++) {
        const first = Math.ceil(chain.gpas[i] / 4096);
        const end = Math.floor((chain.gpas[i] + chain.lengths[i]) / 4096);
        for (let pfn = first; pfn < Math.min(end, this.ballooned.length); pfn++) {
          if (this.#hintBitmap?.add(pfn) === true) this.counters.hintedPages++;
        }
      }
    } else if (chain.writableSegments > 0) this.counters.staleHints += chain.writableSegments;
    return this.#port.costs.exitNs;
  }
}

/** PFNs are taken out of a buffer this many bytes at a time, whatever its length. */
const PFN_CHUNK_BYTES: number = 1 << 20;

/** Extends the last `[gfn, count]` run or appends one. */
function appendPage(runs: number[], gfn: number, count: number): void {
  const last = runs.length - 2;
  if (last >= 0 && runs[last] + runs[last + 1] === gfn) runs[last + 1] += count;
  else runs.push(gfn, count);
}
