/**
 * Observed views and the race detector of controlled runs: two accesses to one word, at least one of them a store and not
 * both atomic, must be ordered by synchronisation, even when the outcome was right. Removing a lock is seen although with
 * it went the schedule points that would have shown its absence.
 *
 * Vector clocks as in FastTrack (Flanagan and Freund 2009), with full read vectors: a release joins the thread's clock into
 * the word's, an acquire the word's into the thread's. The hand-over of the schedule orders nothing here. Clocks and
 * shadow are in shared memory; only the thread that runs touches them.
 *
 * Observed is the guest kernel's arena; whoever makes the detector says which of its words are racy by design.
 */
import { MAX_THREADS } from './controlled-schedule.ts';
import { SHARED_REGIONS, type SharedRegion } from './shared-views.ts';

/** Words of the largest observed region. */
const MAX_WORDS = 1 << 16;
const OBSERVED: readonly SharedRegion[] = ['arena'];
const PER_WORD = 1 + 2 * MAX_THREADS;
const CLOCKS = 16;
const SHADOW_BASE: number = CLOCKS + MAX_THREADS * MAX_THREADS;

/** Bytes of the detector's memory: clocks, then per word the last write, the reads, and the clock of atomic operations. */
export const RACE_BYTES: number = (SHADOW_BASE + OBSERVED.length * MAX_WORDS * PER_WORD) * 4;

/** Empties the detector between executions. */
export function resetRaces(buffer: SharedArrayBuffer): void {
  const words = new Int32Array(buffer);
  words.fill(0);
  for (let t = 0; t < MAX_THREADS; t++) words[CLOCKS + t * MAX_THREADS + t] = 1;
}

export interface Race {
  readonly region: SharedRegion;
  readonly word: number;
  readonly kind: 'write after read' | 'write after write' | 'read after write';
  readonly by: number;
  readonly other: number;
}

const TARGET = Symbol('target');

/** The view beneath an observed one, or the view itself. */
export function plainView<T extends ArrayBufferView>(view: T): T {
  return (view as T & { [TARGET]?: T })[TARGET] ?? view;
}

/** One thread's end of the detector. */
export class RaceDetector {
  readonly races: Race[] = [];
  readonly #w: Int32Array;
  readonly #thread: number;
  readonly #clock: number;
  readonly #reported = new Set<number>();
  /** Whether a word of a region may be raced for: by design, with the reason given where the list is made. */
  readonly #racy: (region: SharedRegion, word: number) => boolean;
  /** Off until the execution starts. */
  active = false;

  constructor(
    buffer: SharedArrayBuffer,
    thread: number,
    racy: (region: SharedRegion, word: number) => boolean,
  ) {
    this.#w = new Int32Array(buffer);
    this.#thread = thread;
    this.#clock = CLOCKS + thread * MAX_THREADS;
    this.#racy = racy;
  }

  /** Hands out an observed view of a region that is watched. */
  observe<T extends ArrayBufferView>(region: SharedRegion, view: T): T {
    const slot = OBSERVED.indexOf(region);
    if (slot < 0) return view;
    const bytes = (view as unknown as { BYTES_PER_ELEMENT: number }).BYTES_PER_ELEMENT;
    const first = view.byteOffset / 4;
    const target = view as unknown as Record<string | symbol, unknown> & Int32Array;
    const access = (index: number, write: boolean): void => {
      if (bytes === 8) {
        this.#access(slot, first + 2 * index, write);
        this.#access(slot, first + 2 * index + 1, write);
      } else this.#access(slot, first + ((index * bytes) >> 2), write);
    };
    return new Proxy(target, {
      get: (_, key) => {
        if (key === TARGET) return target;
        if (typeof key === 'symbol') return Reflect.get(target, key, target);
        const index = Number(key);
        if (index >= 0) {
          access(index, false);
          return target[index];
        }
        const value: unknown = Reflect.get(target, key, target);
        if (typeof value !== 'function') return value;
        return (...args: unknown[]): unknown => {
          if (key === 'fill') {
            const [, from, to] = args as [number, number | undefined, number | undefined];
            for (let i = from ?? 0; i < (to ?? target.length); i++) access(i, true);
          }
          return (value as (...a: unknown[]) => unknown).apply(target, args);
        };
      },
      set: (_, key, value) => {
        const index = Number(key);
        access(index, true);
        target[index] = value as number;
        return true;
      },
    }) as unknown as T;
  }

  #access(slot: number, word: number, write: boolean): void {
    if (!this.active || word >= MAX_WORDS) return;
    const w = this.#w;
    const me = this.#thread;
    const at = SHADOW_BASE + (slot * MAX_WORDS + word) * PER_WORD;
    const last = w[at];
    if (last !== 0) {
      const writer = (last >>> 24) - 1;
      if (writer !== me && (last & 0xff_ffff) > w[this.#clock + writer])
        this.#report(slot, word, write ? 'write after write' : 'read after write', writer);
    }
    const now = w[this.#clock + me];
    if (!write) {
      w[at + 1 + me] = now;
      return;
    }
    for (let t = 0; t < MAX_THREADS; t++) {
      if (t === me || w[at + 1 + t] <= w[this.#clock + t]) continue;
      this.#report(slot, word, 'write after read', t);
    }
    w[at] = ((me + 1) << 24) | now;
  }

  #report(slot: number, word: number, kind: Race['kind'], other: number): void {
    const region = OBSERVED[slot];
    const key = slot * MAX_WORDS + word;
    if (this.#reported.has(key) || this.#racy(region, word) || this.races.length > 16) return;
    this.#reported.add(key);
    this.races.push({ region, word, kind, by: this.#thread, other });
  }

  /** Whether this very operation acquires what `writer` released after its plain store. */
  #ordersBy(slot: number, word: number, writer: number, reads: boolean): boolean {
    const at = SHADOW_BASE + (slot * MAX_WORDS + word) * PER_WORD;
    return reads && this.#w[at + 1 + MAX_THREADS + writer] >= (this.#w[at] & 0xff_ffff);
  }

  /** An atomic operation on word `id` (region code in the high byte). */
  atomic(id: number, reads: boolean, writes: boolean): void {
    if (!this.active) return;
    const word = id & 0xff_ffff;
    const region = SHARED_REGIONS[id >> 24];
    // Bells and logs pass between all threads and order nothing that anybody may rely on.
    if (region === 'run-control' || region === 'violations') return;
    // Words of other regions share the clocks of a small table: more order than there is, never less.
    const slot = region === undefined ? -1 : OBSERVED.indexOf(region);
    const w = this.#w;
    // A plain store must be ordered before an atomic access of another thread as well.
    const plain = slot >= 0 && word < MAX_WORDS ? w[SHADOW_BASE + (slot * MAX_WORDS + word) * PER_WORD] : 0;
    const writer = (plain >>> 24) - 1;
    if (
      plain !== 0 &&
      writer !== this.#thread &&
      (plain & 0xff_ffff) > w[this.#clock + writer] &&
      !this.#ordersBy(slot, word, writer, reads)
    )
      this.#report(slot, word, writes ? 'write after write' : 'read after write', writer);
    const home = slot >= 0 ? slot * MAX_WORDS + word : (Math.imul(id, 0x9e3779b1) >>> 0) % MAX_WORDS;
    if (home >= OBSERVED.length * MAX_WORDS) return;
    const at = SHADOW_BASE + home * PER_WORD + 1 + MAX_THREADS;
    const mine = this.#clock;
    if (reads) for (let t = 0; t < MAX_THREADS; t++) if (w[at + t] > w[mine + t]) w[mine + t] = w[at + t];
    if (!writes) return;
    for (let t = 0; t < MAX_THREADS; t++) {
      // A store alone begins a new release sequence; an exchange continues the one it read from.
      if (w[mine + t] > w[at + t] || !reads) w[at + t] = w[mine + t];
    }
    w[mine + this.#thread]++;
  }
}
