/**
 * Observed views and the race detector of controlled runs: two accesses to one word, at least one of them a store and not
 * both atomic, must be ordered by synchronisation, even when the outcome was right. Removing a lock is seen although with
 * it went the schedule points that would have shown its absence.
 *
 * Vector clocks as in FastTrack (Flanagan and Freund 2009), with full read vectors: a release joins the thread's clock into
 * the word's, an acquire the word's into the thread's. The hand-over of the schedule orders nothing here.
 *
 * Observed are the guest kernel's arena, the vCPU control blocks, and of DRAM the rings and page tables (`race-shadow.ts`);
 * whoever makes the detector says which words are racy by design.
 */
import { MAX_THREADS } from './controlled-schedule.ts';
import { RaceShadow, UNIT_CLOCK, UNIT_READS } from './race-shadow.ts';
import { regionOf, SHARED_REGIONS, type SharedRegion } from './shared-views.ts';

const OBSERVED: ReadonlySet<SharedRegion> = new Set(['arena', 'vcpu-control', 'dram']);
/** Most races that one thread reports in an execution. */
const MAX_RACES = 16;

export interface Race {
  readonly region: SharedRegion;
  /** Number of the 32-bit word in the region. */
  readonly word: number;
  readonly kind: 'write after read' | 'write after write' | 'read after write';
  readonly by: number;
  readonly other: number;
}

const TARGET = Symbol('target');
/** Of an observed view: tells that all of it is read. */
const READ_ALL = Symbol('read all');

/** The view beneath an observed one, or the view itself. */
export function plainView<T extends ArrayBufferView>(view: T): T {
  return (view as T & { [TARGET]?: T })[TARGET] ?? view;
}

/** One thread's end of the detector. */
export class RaceDetector {
  readonly races: Race[] = [];
  readonly #shadow: RaceShadow;
  readonly #thread: number;
  readonly #clock: number;
  readonly #reported = new Set<string>();
  /** Whether a word of a region may be raced for: by design, with the reason given where the list is made. */
  readonly #racy: (region: SharedRegion, word: number) => boolean;
  /** Off until the execution starts. */
  active = false;

  constructor(
    buffer: SharedArrayBuffer,
    thread: number,
    racy: (region: SharedRegion, word: number) => boolean,
  ) {
    this.#shadow = new RaceShadow(buffer);
    this.#thread = thread;
    this.#clock = this.#shadow.clock(thread);
    this.#racy = racy;
  }

  /** Frames of DRAM that get another owner. */
  forget(first: number, count: number): void {
    this.#shadow.forget(first, count);
  }

  /** Hands out an observed view of a region that is watched. */
  observe<T extends ArrayBufferView>(region: SharedRegion, view: T): T {
    if (!OBSERVED.has(region)) return view;
    const bytes = bytesPerElement(view);
    const first = view.byteOffset;
    // Half a word of DRAM is a unit of its own; elsewhere nothing is narrower than a word.
    const unit = region === 'dram' ? 2 : 4;
    const target = view as unknown as Record<string | symbol, unknown> & Int32Array;
    const { length } = target;
    const accessed = (from: number, to: number, write: boolean): void => {
      const end = first + to * bytes;
      const begin = first + from * bytes;
      for (let b = begin - (begin % unit); b < end; b += unit) {
        // Frames that nobody watches, a page at a time.
        if (region === 'dram' && (b & 4095) === 0 && !this.#watched(region, b)) b += 4096 - unit;
        else this.#access(region, b, write);
      }
    };
    /** What a method of the array reads and writes; one that is not named here reads it all. */
    const called = (method: string, args: readonly unknown[]): void => {
      /** Argument `n` as a position in the array: from the end if it is negative, as the language has it. */
      const at = (n: number, otherwise: number): number => {
        const given = (args[n] as number | undefined) ?? otherwise;
        return given < 0 ? Math.max(length + given, 0) : Math.min(given, length);
      };
      switch (method) {
        case 'fill':
          accessed(at(1, 0), at(2, length), true);
          break;
        case 'set': {
          const source = args[0] as ArrayLike<number> & { [READ_ALL]?: () => void };
          const start = (args[1] as number | undefined) ?? 0;
          source[READ_ALL]?.();
          accessed(start, start + source.length, true);
          break;
        }
        case 'copyWithin': {
          const [to, from] = [at(0, 0), at(1, 0)];
          const count = Math.max(0, Math.min(at(2, length) - from, length - to));
          accessed(from, from + count, false);
          accessed(to, to + count, true);
          break;
        }
        case 'slice':
          accessed(at(0, 0), at(1, length), false);
          break;
        case 'at':
          accessed(at(0, 0), at(0, 0) + 1, false);
          break;
        default:
          accessed(0, length, false);
      }
    };
    return new Proxy(target, {
      get: (_, key) => {
        if (key === TARGET) return target;
        if (key === READ_ALL) return () => accessed(0, length, false);
        if (key === Symbol.iterator)
          return () => {
            accessed(0, length, false);
            return target[Symbol.iterator]();
          };
        if (typeof key === 'symbol') return Reflect.get(target, key, target);
        const index = Number(key);
        if (index >= 0) {
          accessed(index, index + 1, false);
          return target[index];
        }
        const value: unknown = Reflect.get(target, key, target);
        if (typeof value !== 'function') return value;
        // A part of an observed view is one.
        if (key === 'subarray')
          return (from?: number, to?: number): T =>
            this.observe(region, target.subarray(from, to) as unknown as T);
        return (...args: unknown[]): unknown => {
          called(key, args);
          // From another view into this one: as bytes, which may overlap.
          if (key === 'set') args[0] = plainView(args[0] as ArrayBufferView);
          return (value as (...a: unknown[]) => unknown).apply(target, args);
        };
      },
      set: (_, key, value) => {
        const index = Number(key);
        accessed(index, index + 1, true);
        target[index] = value as number;
        return true;
      },
    }) as unknown as T;
  }

  #watched(region: SharedRegion, byte: number): boolean {
    return this.active && this.#shadow.unit(region, byte) >= 0;
  }

  #access(region: SharedRegion, byte: number, write: boolean): void {
    if (!this.active) return;
    const at = this.#shadow.unit(region, byte);
    if (at < 0) return;
    const w = this.#shadow.words;
    const me = this.#thread;
    const last = w[at];
    if (last !== 0) {
      const writer = (last >>> 24) - 1;
      if (writer !== me && (last & 0xff_ffff) > w[this.#clock + writer])
        this.#report(region, byte, write ? 'write after write' : 'read after write', writer);
    }
    const now = w[this.#clock + me];
    if (!write) {
      w[at + UNIT_READS + me] = now;
      return;
    }
    for (let t = 0; t < MAX_THREADS; t++) {
      if (t === me || w[at + UNIT_READS + t] <= w[this.#clock + t]) continue;
      this.#report(region, byte, 'write after read', t);
    }
    w[at] = ((me + 1) << 24) | now;
  }

  #report(region: SharedRegion, byte: number, kind: Race['kind'], other: number): void {
    const word = byte >> 2;
    const key = `${region} ${word}`;
    if (this.#reported.has(key) || this.#racy(region, word) || this.races.length >= MAX_RACES) return;
    this.#reported.add(key);
    this.races.push({ region, word, kind, by: this.#thread, other });
  }

  /** An atomic operation on element `index` of a plain view; `id` names the word. */
  atomic(view: ArrayBufferView, index: number, id: number, reads: boolean, writes: boolean): void {
    if (!this.active) return;
    const region = SHARED_REGIONS[regionOf(view.buffer)];
    // Bells and logs pass between all threads and order nothing that anybody may rely on.
    if (region === 'run-control' || region === 'violations') return;
    const shadow = this.#shadow;
    const w = shadow.words;
    const byte = view.byteOffset + index * bytesPerElement(view);
    if (region === 'dram') shadow.watch(byte);
    const unit = region === undefined ? -1 : shadow.unit(region, byte);
    const at = unit < 0 ? shadow.other(id) : unit;
    // A plain store must be ordered before an atomic access of another thread as well.
    const plain = unit < 0 ? 0 : w[at];
    const writer = (plain >>> 24) - 1;
    if (plain !== 0 && writer !== this.#thread && (plain & 0xff_ffff) > w[this.#clock + writer]) {
      // Unless this very operation acquires what the writer released after its plain store.
      const ordered = reads && w[at + UNIT_CLOCK + writer] >= (plain & 0xff_ffff);
      if (!ordered && region !== undefined)
        this.#report(region, byte, writes ? 'write after write' : 'read after write', writer);
    }
    const mine = this.#clock;
    const theirs = at + UNIT_CLOCK;
    if (reads)
      for (let t = 0; t < MAX_THREADS; t++) if (w[theirs + t] > w[mine + t]) w[mine + t] = w[theirs + t];
    if (!writes) return;
    for (let t = 0; t < MAX_THREADS; t++) {
      // A store alone begins a new release sequence; an exchange continues the one it read from.
      if (w[mine + t] > w[theirs + t] || !reads) w[theirs + t] = w[mine + t];
    }
    w[mine + this.#thread]++;
  }
}

function bytesPerElement(view: ArrayBufferView): number {
  return (view as unknown as { BYTES_PER_ELEMENT: number }).BYTES_PER_ELEMENT;
}
