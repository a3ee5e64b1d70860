/**
 * The memory device (virtio-mem), device 24 (virtio 1.2 § 5.15): a region of guest-physical addresses whose blocks its
 * driver plugs and unplugs. The bitmap of plugged blocks is the truth; `plugged_size` is its population.
 *
 * Requests are answered in QEMU's order (`hw/virtio/virtio-mem.c`): a range that is not valid is an ERROR; a plug that
 * would exceed the requested size a NACK; a block in the wrong state an ERROR; while a migration runs, BUSY; else ACK.
 * What stands between a guest and unplugged memory is `unplugged-memory.ts`.
 */
import { assert, Bitmap, PAGE_SIZE } from '@ebb/machine';
import {
  EBB_MEM_F_EXCHANGE,
  EBB_MEM_F_MORE,
  EBB_MEM_REQ_EXCHANGE,
  EBB_MEM_REQ_MORE,
  EBB_MEM_REQ_TO_OFFSET,
  Features,
  MEM_CFG_BYTES,
  MEM_QUEUE_REQUEST,
  MEM_REQ_BYTES,
  MEM_RESP_BYTES,
  MEM_RESP_STATE_OFFSET,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_INDIRECT_DESC,
  VIRTIO_F_VERSION_1,
  VIRTIO_ID_MEM,
  VIRTIO_MEM_F_ACPI_PXM,
  VIRTIO_MEM_F_PERSISTENT_SUSPEND,
  VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE,
  VIRTIO_MEM_REQ_PLUG,
  VIRTIO_MEM_REQ_STATE,
  VIRTIO_MEM_REQ_UNPLUG,
  VIRTIO_MEM_REQ_UNPLUG_ALL,
  VIRTIO_MEM_RESP_ACK,
  VIRTIO_MEM_RESP_BUSY,
  VIRTIO_MEM_RESP_ERROR,
  VIRTIO_MEM_RESP_NACK,
  VIRTIO_MEM_STATE_MIXED,
  VIRTIO_MEM_STATE_PLUGGED,
  VIRTIO_MEM_STATE_UNPLUGGED,
} from '@ebb/virtio/uapi';
import type { DescriptorChain, DeviceHost, SplitDeviceQueue, VirtioDevice } from '@ebb/virtio/device';
import type { TaskYield } from '../host-tasks.ts';
import { DeviceTimeline, QueueRunner, type DevicePort } from './device-port.ts';
import { judgeMemoryDevice } from './memory-figures.ts';
import type { RegionPort } from './region.ts';
import { UnpluggedMemory, type MemoryProfile, type Refusals } from './unplugged-memory.ts';

/** By how much the usable region exceeds the request: twice Linux's memory block on x86. */
const USABLE_EXTENT_BYTES: number = 2 * 0x800_0000;

/** What becomes of plugged memory when the machine is reset; see `MemoryDevice.systemReset`. */
export type RebootPolicy = 'virtio-1.2' | 'rfc-2017' | 'hyper-v';

/** Whoever holds pages of its own: a device with pinned memory. Counts are 4 KiB pages from a guest frame number. */
export interface PageHolder {
  /** Pages are plugged; false: it cannot have them. */
  map(gfn: number, count: number): boolean;
  /** Pages are about to go; false: it does not let them go. */
  unmap(gfn: number, count: number): boolean;
}

export interface MemoryDeviceOptions {
  readonly port: DevicePort;
  readonly region: RegionPort;
  /** Told of blocks that come and go; may refuse. */
  readonly holder?: PageHolder;
  /** How a profile that enforces does it; see `UnpluggedMemory.vmas`. Userfaultfd without it. */
  readonly protection?: 'mprotect' | 'userfaultfd';
  /** Most mappings that the VMM's address space may have for the region (`vm.max_map_count`); Linux's default without it. */
  readonly maxMapCount?: number;
  readonly id: string;
  /** Guest-physical address and size of the region in bytes; multiples of the block size. */
  readonly addr: number;
  readonly regionBytes: number;
  readonly blockBytes: number;
  readonly node: number;
  readonly requestedBytes: number;
  /** Plugged from the start, without holes; 0 without it. */
  readonly pluggedBytes?: number;
  readonly profile?: MemoryProfile;
  /** Told of every event as QEMU's trace lines name them. */
  readonly trace?: (line: string) => void;
  /** Offers `EBB_MEM_F_MORE`: bytes granted, of those a guest asks for beyond what is requested of it; 0 denies. */
  readonly grant?: (bytes: number) => number;
  /** Offers `EBB_MEM_F_EXCHANGE`. */
  readonly exchanges?: boolean;
  /** Told of each request with its answer. */
  readonly onRequest?: (request: MemoryRequest) => void;
  /** Told when the plugged size has changed. */
  readonly onSize?: (bytes: number) => void;
}

export const MEMORY_REQUESTS = ['PLUG', 'UNPLUG', 'UNPLUG_ALL', 'STATE'] as const;
/** Beside those of the specification: the guest asks for more (row H37), or trades blocks (H44). */
type RequestType = (typeof MEMORY_REQUESTS)[number] | 'MORE' | 'EXCHANGE';
export const MEMORY_ANSWERS = ['ACK', 'NACK', 'BUSY', 'ERROR'] as const;

/** A request as it was answered. `addr` is guest-physical. */
export interface MemoryRequest {
  readonly type: RequestType;
  readonly addr: number;
  readonly nbBlocks: number;
  readonly response: (typeof MEMORY_ANSWERS)[number];
}

export interface MemoryDeviceCounters extends Refusals {
  plugRequests: number;
  unplugRequests: number;
  unplugAllRequests: number;
  stateRequests: number;
  moreRequests: number;
  exchangeRequests: number;
  acks: number;
  nacks: number;
  busys: number;
  errors: number;
  pluggedBlocks: number;
  unpluggedBlocks: number;
  discardedPages: number;
}

export class MemoryDevice implements VirtioDevice {
  readonly deviceId: number = VIRTIO_ID_MEM;
  readonly offered: Features;
  readonly configBytes: number = MEM_CFG_BYTES;
  readonly queueMax: readonly number[] = [128];
  readonly id: string;
  readonly addr: number;
  readonly regionBytes: number;
  readonly blockBytes: number;
  readonly node: number;
  readonly profile: MemoryProfile;
  readonly counters: MemoryDeviceCounters = {
    plugRequests: 0,
    unplugRequests: 0,
    unplugAllRequests: 0,
    stateRequests: 0,
    moreRequests: 0,
    exchangeRequests: 0,
    acks: 0,
    nacks: 0,
    busys: 0,
    errors: 0,
    pluggedBlocks: 0,
    unpluggedBlocks: 0,
    discardedPages: 0,
    refusedWrites: 0,
    refusedReads: 0,
    zeroReads: 0,
    letThrough: 0,
    mapCountRefusals: 0,
  };
  /** One bit per block. */
  readonly plugged: Bitmap;
  /** What an access to the rest meets. */
  readonly unplugged: UnpluggedMemory;
  requestedBytes: number;
  usableBytes = 0;
  /** An outgoing migration or the like: every request that changes a block is answered BUSY. */
  busy = false;
  /** Last answer to a plug or unplug, for monitors. */
  lastAnswer: number = VIRTIO_MEM_RESP_ACK;
  #size = 0;
  readonly #region: RegionPort;
  readonly #holder: PageHolder | undefined;
  readonly #port: DevicePort;
  readonly #runner: QueueRunner;
  readonly #timeline = new DeviceTimeline();
  readonly #trace: ((line: string) => void) | undefined;
  readonly #onSize: (bytes: number) => void;
  readonly #onRequest: ((request: MemoryRequest) => void) | undefined;
  #host: DeviceHost | null = null;
  #queue: SplitDeviceQueue | null = null;
  readonly #grant: ((bytes: number) => number) | undefined;
  /** `EBB_MEM_F_MORE` was negotiated, and `EBB_MEM_F_EXCHANGE`. */
  #mayAsk = false;
  #mayTrade = false;

  /** `judgeMemoryDevice` says beforehand whether the figures are possible. */
  constructor(options: MemoryDeviceOptions) {
    const why = judgeMemoryDevice(options);
    assert(why === '', why);
    this.profile = options.profile ?? 'qemu';
    this.offered = Features.of(
      VIRTIO_MEM_F_ACPI_PXM,
      VIRTIO_MEM_F_PERSISTENT_SUSPEND,
      ...(options.grant === undefined ? [] : [EBB_MEM_F_MORE]),
      ...(options.exchanges === true ? [EBB_MEM_F_EXCHANGE] : []),
      ...(this.profile === 'inaccessible' ? [VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE] : []),
      VIRTIO_F_INDIRECT_DESC,
      VIRTIO_F_EVENT_IDX,
      VIRTIO_F_VERSION_1,
    );
    this.id = options.id;
    this.addr = options.addr;
    this.regionBytes = options.regionBytes;
    this.blockBytes = options.blockBytes;
    this.node = options.node;
    this.requestedBytes = options.requestedBytes;
    this.plugged = new Bitmap(options.regionBytes / options.blockBytes);
    this.unplugged = new UnpluggedMemory({ ...options, profile: this.profile }, this.plugged, this.counters);
    this.#region = options.region;
    this.#holder = options.holder;
    this.#port = options.port;
    this.#trace = options.trace;
    this.#onSize = options.onSize ?? (() => undefined);
    this.#onRequest = options.onRequest;
    this.#grant = options.grant;
    this.#runner = new QueueRunner(options.port, `virtio-mem/${options.id}`, (_index, kicked) =>
      this.#serve(kicked),
    );
    this.#resizeUsable(true);
    for (let b = 0; b < (options.pluggedBytes ?? 0) / options.blockBytes; b++) this.plugged.add(b);
    this.#size = options.pluggedBytes ?? 0;
  }

  get baseGfn(): number {
    return this.addr / PAGE_SIZE;
  }

  /** Bytes plugged: population of the bitmap × block size, always. */
  get pluggedBytes(): number {
    return this.#size;
  }

  attach(host: DeviceHost): void {
    this.#host = host;
  }
  activate(queues: readonly (SplitDeviceQueue | null)[], features: Features): void {
    this.#mayAsk = features.has(EBB_MEM_F_MORE);
    this.#mayTrade = features.has(EBB_MEM_F_EXCHANGE);
    this.#queue = queues[MEM_QUEUE_REQUEST] ?? null;
  }
  kick(_index: number): void {
    this.#runner.kick(MEM_QUEUE_REQUEST);
  }

  get idle(): boolean {
    return this.#runner.idle;
  }

  /** Device reset: no block changes its state or content (I10). */
  reset(): void {
    this.#queue = null;
  }

  // ── Configuration ────────────────────────────────────────────────────────────────────────────────────────────────

  readConfig(offset: number, width: number, _features: Features): number {
    const fields = [
      this.blockBytes,
      this.node,
      this.addr,
      this.regionBytes,
      this.usableBytes,
      this.#size,
      this.requestedBytes,
    ];
    const field = fields[offset >> 3] ?? 0;
    const half = (offset & 4) === 0 ? field >>> 0 : Math.floor(field / 0x1_0000_0000);
    return (half >>> (8 * (offset & 3))) & (width === 4 ? 0xffffffff : (1 << (8 * width)) - 1);
  }

  /** The whole configuration is read-only to the driver. */
  writeConfig(_offset: number, _width: number, _value: number, _features: Features): void {}

  /**
   * Asks the guest for another size, which must be a multiple of the block size and fit the region. The usable region
   * grows with the request and never shrinks by it. Returns before anything is done.
   */
  setRequested(bytes: number): void {
    assert(bytes % this.blockBytes === 0 && bytes >= 0 && bytes <= this.regionBytes, 'a size the region has');
    if (bytes === this.requestedBytes) return;
    this.requestedBytes = bytes;
    this.#resizeUsable(false);
    this.#host?.configChanged();
  }

  #resizeUsable(mayShrink: boolean): void {
    const wanted =
      this.requestedBytes === 0
        ? 0
        : Math.ceil(Math.min(this.regionBytes, this.requestedBytes + USABLE_EXTENT_BYTES) / this.blockBytes) *
          this.blockBytes;
    if (wanted <= this.usableBytes && !mayShrink) return;
    this.#trace?.(
      `virtio_mem_resized_usable_region old_size=0x${this.usableBytes.toString(16)}new_size=0x${wanted.toString(16)}`,
    );
    this.usableBytes = wanted;
    this.#host?.configMoved();
  }

  // ── Requests ─────────────────────────────────────────────────────────────────────────────────────────────────────

  *#serve(kicked: number): Generator<TaskYield, void, void> {
    const queue = this.#queue;
    if (queue === null) return;
    do {
      queue.disableKicks();
      for (;;) {
        const chain = queue.pop();
        if (chain === null) break;
        const request = new Uint8Array(MEM_REQ_BYTES);
        if (chain.read(0, request) !== MEM_REQ_BYTES || chain.writableBytes < MEM_RESP_BYTES) {
          this.#host?.needsReset('request or response buffer too short');
          return;
        }
        const view = new DataView(request.buffer);
        const type = view.getUint16(0, true);
        const known =
          type <= VIRTIO_MEM_REQ_STATE ||
          (type === EBB_MEM_REQ_MORE && this.#mayAsk) ||
          (type === EBB_MEM_REQ_EXCHANGE && this.#mayTrade);
        if (!known) {
          this.#host?.needsReset(`unknown request type ${type}`);
          return;
        }
        const addr = view.getUint32(8, true) + view.getUint32(12, true) * 0x1_0000_0000;
        const nbBlocks = view.getUint16(16, true);
        const to = this.addr + view.getUint32(EBB_MEM_REQ_TO_OFFSET, true) * this.blockBytes;
        const { answer, state, cost } = yield* this.#request(type, addr, nbBlocks, to);
        this.#onRequest?.({
          type: MEMORY_REQUESTS[type] ?? (type === EBB_MEM_REQ_MORE ? 'MORE' : 'EXCHANGE'),
          addr,
          nbBlocks,
          response: MEMORY_ANSWERS[answer],
        });
        // Others have their turn after each request: a guest may add them as fast as we take them.
        yield undefined;
        // A reset meanwhile took the buffer back: touch nothing of it.
        if (this.#queue !== queue) return;
        this.#host?.completes(this.#timeline.complete(kicked, cost + this.#port.costs.queueRoundTripNs));
        this.#respond(queue, chain, answer, state);
        this.#host?.queueInterrupt(MEM_QUEUE_REQUEST);
      }
      if (queue.error !== null) {
        this.#host?.needsReset(queue.error.kind);
        return;
      }
    } while (queue.enableKicks());
  }

  #respond(queue: SplitDeviceQueue, chain: DescriptorChain, answer: number, state: number): void {
    const bytes = new Uint8Array(MEM_RESP_BYTES);
    const view = new DataView(bytes.buffer);
    view.setUint16(0, answer, true);
    view.setUint16(MEM_RESP_STATE_OFFSET, state, true);
    chain.write(0, bytes);
    const { counters } = this;
    if (answer === VIRTIO_MEM_RESP_ACK) counters.acks++;
    else if (answer === VIRTIO_MEM_RESP_NACK) counters.nacks++;
    else if (answer === VIRTIO_MEM_RESP_BUSY) counters.busys++;
    else counters.errors++;
    this.#trace?.(`virtio_mem_send_response type=${answer}`);
    queue.push(chain, MEM_RESP_BYTES);
    queue.recycle(chain);
  }

  *#request(
    type: number,
    addr: number,
    nrBlocks: number,
    to: number,
  ): Generator<TaskYield, { answer: number; state: number; cost: number }, void> {
    const { counters } = this;
    const { exitNs, discardLeafNs } = this.#port.costs;
    let answer: number = VIRTIO_MEM_RESP_ACK;
    let state = 0;
    let cost = exitNs;
    switch (type) {
      case VIRTIO_MEM_REQ_PLUG:
        counters.plugRequests++;
        this.#trace?.(`virtio_mem_plug_request addr=0x${addr.toString(16)} nb_blocks=${nrBlocks}`);
        answer = yield* this.#plug(addr, nrBlocks);
        this.lastAnswer = answer;
        break;
      case VIRTIO_MEM_REQ_UNPLUG:
        counters.unplugRequests++;
        this.#trace?.(`virtio_mem_unplug_request addr=0x${addr.toString(16)} nb_blocks=${nrBlocks}`);
        answer = yield* this.#unplug(addr, nrBlocks);
        this.lastAnswer = answer;
        cost += discardLeafNs;
        break;
      case VIRTIO_MEM_REQ_UNPLUG_ALL:
        counters.unplugAllRequests++;
        this.#trace?.('virtio_mem_unplug_all_request ');
        if (this.busy || !this.#askUnplugAll()) answer = VIRTIO_MEM_RESP_BUSY;
        else yield* this.#unplugAll();
        cost += discardLeafNs;
        break;
      case VIRTIO_MEM_REQ_STATE:
        counters.stateRequests++;
        this.#trace?.(`virtio_mem_state_request addr=0x${addr.toString(16)} nb_blocks=${nrBlocks}`);
        if (!this.#valid(addr, nrBlocks)) answer = VIRTIO_MEM_RESP_ERROR;
        else state = this.#stateOf(addr, nrBlocks);
        break;
      case EBB_MEM_REQ_MORE:
        counters.moreRequests++;
        answer = this.#more(nrBlocks * this.blockBytes);
        break;
      case EBB_MEM_REQ_EXCHANGE:
        counters.exchangeRequests++;
        answer = yield* this.#exchange(addr, nrBlocks, to);
        cost += discardLeafNs;
        break;
    }
    return { answer, state, cost };
  }

  /** The guest wants `bytes` beyond what is requested of it; the host decides. */
  #more(bytes: number): number {
    const room = this.regionBytes - this.requestedBytes;
    const granted = Math.floor(Math.min(room, this.#grant?.(Math.min(room, bytes)) ?? 0) / this.blockBytes);
    if (granted <= 0) return VIRTIO_MEM_RESP_NACK;
    this.requestedBytes += granted * this.blockBytes;
    this.#resizeUsable(false);
    this.#host?.configChanged();
    return VIRTIO_MEM_RESP_ACK;
  }

  /** Whole blocks inside the usable region. */
  #valid(addr: number, nrBlocks: number): boolean {
    return (
      addr % this.blockBytes === 0 &&
      nrBlocks > 0 &&
      addr >= this.addr &&
      addr + nrBlocks * this.blockBytes <= this.addr + this.usableBytes
    );
  }

  #first(addr: number): number {
    return (addr - this.addr) / this.blockBytes;
  }

  #stateOf(addr: number, nrBlocks: number): number {
    const first = this.#first(addr);
    let plugged = 0;
    for (let b = first; b < first + nrBlocks; b++) if (this.plugged.has(b)) plugged++;
    if (plugged === nrBlocks) return VIRTIO_MEM_STATE_PLUGGED;
    return plugged === 0 ? VIRTIO_MEM_STATE_UNPLUGGED : VIRTIO_MEM_STATE_MIXED;
  }

  /**
   * Plugs blocks for others that go, in one step: nobody is told of a size in between. What can refuse is asked before
   * anything is changed; only the holder's new pages are not to be had beforehand, and it has the old ones back then.
   */
  *#exchange(from: number, nrBlocks: number, to: number): Generator<TaskYield, number, void> {
    const pages = (nrBlocks * this.blockBytes) / PAGE_SIZE;
    if (!this.#valid(from, nrBlocks) || this.#stateOf(from, nrBlocks) !== VIRTIO_MEM_STATE_PLUGGED)
      return VIRTIO_MEM_RESP_ERROR;
    if (!this.#valid(to, nrBlocks) || this.#stateOf(to, nrBlocks) !== VIRTIO_MEM_STATE_UNPLUGGED)
      return VIRTIO_MEM_RESP_ERROR;
    if (this.busy || !this.unplugged.fits(this.#first(to), nrBlocks, true)) return VIRTIO_MEM_RESP_BUSY;
    if (this.#holder?.unmap(from / PAGE_SIZE, pages) === false) return VIRTIO_MEM_RESP_BUSY;
    yield* this.#prepare(to, nrBlocks);
    if (!(yield* this.#populate(this.#first(to), nrBlocks))) {
      this.#holder?.map(from / PAGE_SIZE, pages);
      return VIRTIO_MEM_RESP_BUSY;
    }
    this.counters.pluggedBlocks += nrBlocks;
    yield* this.#withdraw(from, nrBlocks);
    return VIRTIO_MEM_RESP_ACK;
  }

  *#plug(addr: number, nrBlocks: number): Generator<TaskYield, number, void> {
    if (!this.#valid(addr, nrBlocks)) return VIRTIO_MEM_RESP_ERROR;
    if (this.#size + nrBlocks * this.blockBytes > this.requestedBytes) return VIRTIO_MEM_RESP_NACK;
    if (this.#stateOf(addr, nrBlocks) !== VIRTIO_MEM_STATE_UNPLUGGED) return VIRTIO_MEM_RESP_ERROR;
    if (this.busy || !this.unplugged.fits(this.#first(addr), nrBlocks, true)) return VIRTIO_MEM_RESP_BUSY;
    yield* this.#prepare(addr, nrBlocks);
    if (!(yield* this.#populate(this.#first(addr), nrBlocks))) return VIRTIO_MEM_RESP_BUSY;
    this.counters.pluggedBlocks += nrBlocks;
    this.#sizeIs(this.#size + nrBlocks * this.blockBytes);
    return VIRTIO_MEM_RESP_ACK;
  }

  /** What reads of unplugged memory mapped must go before the block is memory again, and with it what was written there. */
  *#prepare(addr: number, nrBlocks: number): Generator<TaskYield, void, void> {
    const pages = (nrBlocks * this.blockBytes) / PAGE_SIZE;
    if (this.profile === 'scribble') yield* this.#discard(addr, pages);
    else if (this.profile !== 'qemu') yield* this.#region.unmap(addr / PAGE_SIZE, pages);
  }

  /** Makes unplugged blocks memory, unless somebody who holds pages of its own cannot have them: false, and undone. */
  *#populate(first: number, nrBlocks: number): Generator<TaskYield, boolean, void> {
    const gfn = this.baseGfn + (first * this.blockBytes) / PAGE_SIZE;
    const pages = (nrBlocks * this.blockBytes) / PAGE_SIZE;
    if (this.#region.activate !== undefined) yield* this.#region.activate(gfn, pages);
    for (let b = first; b < first + nrBlocks; b++) this.plugged.add(b);
    if (this.#holder?.map(gfn, pages) === false) {
      for (let b = first; b < first + nrBlocks; b++) this.plugged.delete(b);
      yield* this.#discard(gfn * PAGE_SIZE, pages);
      yield* this.#deactivate(gfn, pages);
      return false;
    }
    return true;
  }

  *#unplug(addr: number, nrBlocks: number): Generator<TaskYield, number, void> {
    if (!this.#valid(addr, nrBlocks)) return VIRTIO_MEM_RESP_ERROR;
    if (this.#stateOf(addr, nrBlocks) !== VIRTIO_MEM_STATE_PLUGGED) return VIRTIO_MEM_RESP_ERROR;
    const pages = (nrBlocks * this.blockBytes) / PAGE_SIZE;
    if (this.busy || !this.unplugged.fits(this.#first(addr), nrBlocks, false)) return VIRTIO_MEM_RESP_BUSY;
    if (this.#holder?.unmap(addr / PAGE_SIZE, pages) === false) return VIRTIO_MEM_RESP_BUSY;
    yield* this.#withdraw(addr, nrBlocks);
    this.#sizeIs(this.#size - nrBlocks * this.blockBytes);
    return VIRTIO_MEM_RESP_ACK;
  }

  /** Takes plugged blocks away, with their content. Whoever holds pages of them has let go. */
  *#withdraw(addr: number, nrBlocks: number): Generator<TaskYield, void, void> {
    const first = this.#first(addr);
    const pages = (nrBlocks * this.blockBytes) / PAGE_SIZE;
    const close = (): void => {
      for (let b = first; b < first + nrBlocks; b++) this.plugged.delete(b);
    };
    // Where a profile refuses, it refuses first and discards then (H10); QEMU discards and only then says so.
    if (this.profile !== 'qemu') close();
    yield* this.#discard(addr, pages);
    close();
    yield* this.#deactivate(addr / PAGE_SIZE, pages);
    this.counters.unpluggedBlocks += nrBlocks;
  }

  /** After blocks were unplugged. */
  *#deactivate(gfn: number, pages: number): Generator<TaskYield, void, void> {
    const blockOf = (page: number): number => ((page - this.baseGfn) * PAGE_SIZE) / this.blockBytes;
    const anyPlugged = (from: number, count: number): boolean => {
      for (let b = blockOf(from); b < blockOf(from + count); b++) if (this.plugged.has(b)) return true;
      return false;
    };
    if (this.#region.deactivate !== undefined) yield* this.#region.deactivate(gfn, pages, anyPlugged);
  }

  *#discard(addr: number, pages: number): Generator<TaskYield, void, void> {
    this.counters.discardedPages += yield* this.#region.discard(addr / PAGE_SIZE, pages);
  }

  /** Runs of plugged blocks: the first of each and how many. */
  #runs(): (readonly [first: number, count: number])[] {
    const runs: (readonly [number, number])[] = [];
    for (let b = 0; b < this.plugged.length; b++) {
      if (!this.plugged.has(b)) continue;
      const first = b;
      while (b < this.plugged.length && this.plugged.has(b)) b++;
      runs.push([first, b - first]);
    }
    return runs;
  }

  /** Asks whoever holds pages of plugged blocks, run by run; false, and it has all of them again: some it does not let go. */
  #askUnplugAll(): boolean {
    const pages = this.blockBytes / PAGE_SIZE;
    const gone: (readonly [gfn: number, count: number])[] = [];
    for (const [first, count] of this.#runs()) {
      const run = [this.baseGfn + first * pages, count * pages] as const;
      if (this.#holder?.unmap(...run) === false) {
        for (const back of gone) this.#holder.map(...back);
        return false;
      }
      gone.push(run);
    }
    return true;
  }

  /** Unplugs every block and lets the usable region shrink: UNPLUG_ALL, and system reset. Holders have been told. */
  *#unplugAll(): Generator<TaskYield, void, void> {
    const blocks = this.plugged.count();
    if (blocks > 0) {
      if (this.profile !== 'qemu') this.plugged.clear();
      yield* this.#discard(this.addr, this.regionBytes / PAGE_SIZE);
      this.plugged.clear();
      yield* this.#deactivate(this.baseGfn, this.regionBytes / PAGE_SIZE);
      this.counters.unpluggedBlocks += blocks;
      this.#sizeIs(0);
    }
    this.#trace?.('virtio_mem_unplugged_all ');
    this.#resizeUsable(true);
  }

  /**
   * System reset. `virtio-1.2`: all blocks are unplugged, and the driver plugs what is requested again. `rfc-2017`: the
   * region shrinks to what was plugged, without holes, and stays (H9); the content is gone. It shrinks to nothing if
   * somebody who holds pages of its own cannot have them again. `hyper-v`, for comparison: each block stays where it is,
   * so that the next kernel is told of memory that it has no driver for (H60).
   */
  *systemReset(policy: RebootPolicy): Generator<TaskYield, void, void> {
    // What a request began before the reset is carried out first, so that it is undone with the rest.
    if (!this.idle) yield () => this.idle;
    const runs = this.#runs();
    const blocks = this.plugged.count();
    // Nobody is asked, but everybody told.
    const pages = this.blockBytes / PAGE_SIZE;
    for (const [first, count] of runs) this.#holder?.unmap(this.baseGfn + first * pages, count * pages);
    yield* this.#unplugAll();
    if (policy === 'virtio-1.2') return;
    if (policy === 'rfc-2017') this.requestedBytes = blocks * this.blockBytes;
    this.#resizeUsable(true);
    const kept = policy === 'hyper-v' ? runs : blocks > 0 ? [[0, blocks] as const] : [];
    for (const [first, count] of kept)
      if (yield* this.#populate(first, count)) this.#sizeIs(this.#size + count * this.blockBytes);
  }

  #sizeIs(bytes: number): void {
    this.#size = bytes;
    this.#host?.configMoved();
    this.#onSize(bytes);
  }
}
