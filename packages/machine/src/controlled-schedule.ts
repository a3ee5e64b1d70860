/**
 * The controlled schedule: real workers, one runnable at a time. At each point the running thread picks the next one
 * from a strategy and hands over; the same choices give the same interleaving, every time.
 *
 * Everything is in one shared buffer, so that whoever runs can pick. A thread waits on a word of its own (`GO`) with
 * plain wait and notify; only the thread that runs touches anything else, and the hand-over orders it.
 *
 * **Waits are modelled.** A thread that spins (`spin`) may run again once another thread has made progress; one that
 * sleeps (`sleep`) only after a wake-up. When nobody may run, nobody ever will: a deadlock or a lost wake-up, reported
 * with each thread's point. More steps than the limit is a livelock.
 *
 * **Choices.** With more than one candidate a choice is a number: 0 is the thread that runs (if it may), then the others
 * in ascending order. Choices given in advance come first (replay, shrinking), then the strategy's; past both, 0.
 */
import { assert } from './assert.ts';
import { POINTS, type Point, type Schedule } from './schedule.ts';

/** How the next thread is picked once the given choices are used up. */
export const STRATEGIES = ['none', 'random', 'pct'] as const;
export type Strategy = (typeof STRATEGIES)[number];
const NONE: number = STRATEGIES.indexOf('none');
const RANDOM: number = STRATEGIES.indexOf('random');

export const MAX_THREADS = 8;
const MAX_CHOICES = 16384;
const MAX_EVENTS = 65536;
const MAX_CHANGES = 8;

// Words of the buffer.
const STEPS = 1;
/** Moves with each step that could let a spinning thread go on. */
const PROGRESS = 2;
const ABORT = 3;
const THREADS = 4;
const RNG = 5;
const STRATEGY = 6;
/** 1 while a preamble runs: no preemption, nothing recorded. */
const QUIET = 7;
const CHOICES = 8;
const GIVEN = 9;
const READY = 10;
const LIMIT = 11;
const EVENTS = 12;
const SWITCHES = 13;
const HASH = 14;
const FAILED = 15;
const CHANGES = 16;
const CHANGE_AT = 17;
/** Per thread, one 64-byte line. */
const THREAD_BASE = 64;
const GO = 0;
const STATE = 1;
const BLOCKED_AT = 2;
const SLEEPS_ON = 3;
const POINT = 4;
const DETAIL = 5;
const PRIORITY = 6;
const GIVEN_BASE: number = THREAD_BASE + 16 * MAX_THREADS;
/** Two words each: event at which it was made; options, whether the chooser could go on, choice. */
const CHOICE_BASE: number = GIVEN_BASE + MAX_CHOICES;
/** Two words each: thread, point and whether it switched; detail. */
const EVENT_BASE: number = CHOICE_BASE + 2 * MAX_CHOICES;
export const SCHEDULE_BYTES: number = (EVENT_BASE + 2 * MAX_EVENTS) * 4;

const ABSENT = 0;
const RUNNABLE = 1;
const SPINNING = 2;
const ASLEEP = 3;
const ENDED = 4;

const STATE_NAMES = ['absent', 'runnable', 'spinning', 'asleep', 'ended'] as const;

/** Why an execution ended before its threads did. */
export const FAILURES = ['', 'deadlock', 'livelock', 'stopped'] as const;
export type ScheduleFailure = (typeof FAILURES)[number];

/** Points after which a spinning thread need not look again: they change nothing others wait for. */
const NO_PROGRESS: ReadonlySet<Point> = new Set([
  'section',
  'load',
  'spin',
  'wait',
  'task-choice',
  'task-yield',
  'stored',
]);
const PROGRESSES: readonly boolean[] = POINTS.map((p) => !NO_PROGRESS.has(p));
const CODES: ReadonlyMap<Point, number> = new Map(POINTS.map((p, i) => [p, i]));

/** Before the workers replace `Atomics` by the observed one: hand-over itself is no event. */
const { load, store, wait, notify, add } = Atomics;

/** Unwinds a worker whose execution was given up. */
export class ScheduleAborted extends Error {
  constructor() {
    super('the execution was given up');
    this.name = 'ScheduleAborted';
  }
}

export interface ScheduleStart {
  readonly threads: number;
  readonly strategy: Strategy;
  readonly seed: number;
  /** PCT: priority change points, and the number of steps they are spread over. */
  readonly depth: number;
  readonly length: number;
  /** Choices to make first. */
  readonly choices: readonly number[];
  /** Steps after which the execution counts as a livelock. */
  readonly limit: number;
}

export interface ScheduleEvent {
  readonly thread: number;
  readonly point: Point;
  readonly detail: number;
}

export interface ScheduleOutcome {
  readonly failure: ScheduleFailure;
  readonly steps: number;
  readonly switches: number;
  /** FNV-1a over all events: two executions with one hash had the same interleaving. */
  readonly hash: number;
  /** What was chosen, out of how many, at which event, and whether anything but 0 is a preemption. */
  readonly choices: readonly number[];
  readonly options: readonly number[];
  readonly at: readonly number[];
  readonly preemptive: readonly boolean[];
  readonly positions: readonly string[];
}

/** Main's side: prepares an execution and reads what became of it. */
export class ScheduleBuffer {
  readonly buffer: SharedArrayBuffer;
  readonly #w: Int32Array;

  constructor(buffer: SharedArrayBuffer = new SharedArrayBuffer(SCHEDULE_BYTES)) {
    this.buffer = buffer;
    this.#w = new Int32Array(buffer);
  }

  prepare(start: ScheduleStart): void {
    const w = this.#w;
    assert(start.threads <= MAX_THREADS, `at most ${MAX_THREADS} threads`);
    w.fill(0, 0, GIVEN_BASE);
    w[THREADS] = start.threads;
    w[STRATEGY] = STRATEGIES.indexOf(start.strategy);
    w[LIMIT] = start.limit;
    // Never 0, which xorshift does not leave.
    w[RNG] = Math.imul(start.seed + 1, 0x9e3779b1) | 1;
    w[HASH] = 0x811c9dc5 | 0;
    w[GIVEN] = Math.min(start.choices.length, MAX_CHOICES);
    for (let i = 0; i < w[GIVEN]; i++) w[GIVEN_BASE + i] = start.choices[i];
    const random = (): number => nextRandom(w);
    // Priorities: a random order of threads; change points: random steps at which the runner drops below all.
    const order = Array.from({ length: start.threads }, (_, t) => t);
    for (let i = order.length - 1; i > 0; i--) {
      const j = random() % (i + 1);
      [order[i], order[j]] = [order[j], order[i]];
    }
    order.forEach((t, i) => {
      w[THREAD_BASE + 16 * t + PRIORITY] = 100 + i;
    });
    w[CHANGES] = Math.min(start.depth, MAX_CHANGES);
    for (let i = 0; i < w[CHANGES]; i++) w[CHANGE_AT + i] = 1 + (random() % Math.max(1, start.length));
  }

  /** Gives up: workers unwind at their next point. */
  stop(): void {
    store(this.#w, ABORT, 1);
    for (let t = 0; t < MAX_THREADS; t++) {
      store(this.#w, THREAD_BASE + 16 * t + GO, 1);
      notify(this.#w, THREAD_BASE + 16 * t + GO);
    }
  }

  /** The few numbers that say how it went. */
  summary(): Pick<ScheduleOutcome, 'failure' | 'steps' | 'switches' | 'hash'> {
    const w = this.#w;
    return { failure: FAILURES[w[FAILED]], steps: w[STEPS], switches: w[SWITCHES], hash: w[HASH] };
  }

  outcome(): ScheduleOutcome {
    const w = this.#w;
    const choices: number[] = [];
    const options: number[] = [];
    const at: number[] = [];
    const preemptive: boolean[] = [];
    for (let i = 0; i < Math.min(w[CHOICES], MAX_CHOICES); i++) {
      const word = w[CHOICE_BASE + 2 * i + 1];
      at.push(w[CHOICE_BASE + 2 * i]);
      choices.push(word & 0xff);
      preemptive.push((word & 0x100) !== 0);
      options.push(word >>> 9);
    }
    const positions: string[] = [];
    for (let t = 0; t < w[THREADS]; t++) {
      const line = THREAD_BASE + 16 * t;
      positions.push(`${STATE_NAMES[w[line + STATE]]} at ${POINTS[w[line + POINT]]} ${w[line + DETAIL]}`);
    }
    return {
      ...this.summary(),
      choices,
      options,
      at,
      preemptive,
      positions,
    };
  }

  /** The recorded events, oldest first (the first 65,536). */
  events(): ScheduleEvent[] {
    const w = this.#w;
    const out: ScheduleEvent[] = [];
    for (let i = 0; i < Math.min(w[EVENTS], MAX_EVENTS); i++) {
      const word = w[EVENT_BASE + 2 * i];
      out.push({ thread: word >> 8, point: POINTS[word & 0xff], detail: w[EVENT_BASE + 2 * i + 1] });
    }
    return out;
  }
}

/** Xorshift32 over the buffer's word; 31 bits. */
function nextRandom(w: Int32Array): number {
  let x = w[RNG];
  x ^= x << 13;
  x ^= x >>> 17;
  x ^= x << 5;
  w[RNG] = x;
  return x & 0x7fff_ffff;
}

/** One thread's end of a controlled schedule. */
export class ControlledSchedule implements Schedule {
  readonly kind = 'controlled';
  readonly controlled = true;
  readonly thread: number;
  readonly #w: Int32Array;
  readonly #me: number;
  readonly #candidates = new Int32Array(MAX_THREADS);
  /** Progress seen at the last spin. */
  #lastSpin = -1;
  /** The operation of the last point may have changed something that others wait for. */
  #changed = false;
  /** Pairs of points between which control passed, by `from * 32 + to`: coverage of this thread's switches. */
  readonly switched: Int32Array = new Int32Array(1024);

  constructor(buffer: SharedArrayBuffer, thread: number) {
    this.thread = thread;
    this.#w = new Int32Array(buffer);
    this.#me = THREAD_BASE + 16 * thread;
  }

  /** Enters the execution; returns when this thread is first picked. Thread 0 starts it once all have entered. */
  start(): void {
    const w = this.#w;
    w[this.#me + STATE] = RUNNABLE;
    if (add(w, READY, 1) + 1 === w[THREADS]) {
      notify(w, READY);
    }
    if (this.thread !== 0) {
      this.#await();
      return;
    }
    for (let have = load(w, READY); have !== w[THREADS]; have = load(w, READY)) {
      wait(w, READY, have, 50);
      if (load(w, ABORT) !== 0) throw new ScheduleAborted();
    }
    this.point('start', 0);
  }

  /** Leaves the execution for good. */
  end(): void {
    this.#record('end', 0);
    this.#w[this.#me + STATE] = ENDED;
    const next = this.#pick();
    if (next >= 0) this.#go(next);
    else if (this.#someoneWaits()) this.#fail('deadlock');
  }

  /** This thread has crashed: the execution is over. */
  abandon(): void {
    this.#giveUp('stopped');
  }

  /** Runs `body` without preemption and without a trace: boot, set-up. Waits inside still hand over. */
  quietly(body: () => void): void {
    this.#w[QUIET] = 1;
    try {
      body();
    } finally {
      this.#w[QUIET] = 0;
    }
  }

  point(point: Point, detail: number): void {
    const w = this.#w;
    // Set-up before the execution and audit after it are nobody's business.
    if (w[this.#me + STATE] !== RUNNABLE) return;
    this.#record(point, detail);
    if (w[QUIET] !== 0) return;
    if (w[STEPS] > w[LIMIT]) this.#fail('livelock');
    const next = this.#pick();
    if (next !== this.thread) this.#switchTo(next);
  }

  choose(n: number): number {
    const w = this.#w;
    if (n < 2 || w[QUIET] !== 0 || w[this.#me + STATE] !== RUNNABLE) return 0;
    this.#record('task-choice', n);
    return this.#choice(n, w[STRATEGY] === NONE ? 0 : nextRandom(w) % n, true);
  }

  /** Nothing to do until there has been progress: since the last spin, so that a change after the last look counts. */
  spin(point: Point, detail: number): void {
    const w = this.#w;
    this.#record(point, detail);
    w[this.#me + STATE] = SPINNING;
    w[this.#me + BLOCKED_AT] = this.#lastSpin;
    this.#lastSpin = w[PROGRESS];
    // PCT: who spins steps behind all others, or a high priority would spin the run away.
    w[this.#me + PRIORITY] = -w[STEPS];
    this.#yield();
  }

  /** Sleeps on word `id` until `wake`. */
  sleep(id: number): void {
    const w = this.#w;
    this.#record('wait', id);
    w[this.#me + STATE] = ASLEEP;
    w[this.#me + SLEEPS_ON] = id;
    this.#yield();
  }

  /** Lets every thread that sleeps on word `id` go on; how many. */
  wake(id: number): number {
    const w = this.#w;
    this.point('notify', id);
    let woken = 0;
    for (let t = 0; t < w[THREADS]; t++) {
      const at = THREAD_BASE + 16 * t;
      if (w[at + STATE] !== ASLEEP || w[at + SLEEPS_ON] !== id) continue;
      w[at + STATE] = RUNNABLE;
      woken++;
    }
    return woken;
  }

  #record(point: Point, detail: number): void {
    const w = this.#w;
    const code = CODES.get(point) ?? 0;
    w[this.#me + POINT] = code;
    w[this.#me + DETAIL] = detail;
    // A point comes before its operation: what it changes is there only when this thread comes to its next one, and a
    // spinner that looked in between must look again.
    if (this.#changed) w[PROGRESS]++;
    this.#changed = PROGRESSES[code];
    if (this.#changed) w[PROGRESS]++;
    if (load(w, ABORT) !== 0) throw new ScheduleAborted();
    if (w[QUIET] !== 0) return;
    w[STEPS]++;
    const at = w[EVENTS]++;
    if (at < MAX_EVENTS) {
      w[EVENT_BASE + 2 * at] = (this.thread << 8) | code;
      w[EVENT_BASE + 2 * at + 1] = detail;
    }
    w[HASH] = Math.imul(w[HASH] ^ ((this.thread << 8) | code), 0x01000193);
    w[HASH] = Math.imul(w[HASH] ^ detail, 0x01000193);
  }

  /** Who may run, this thread first; the number of candidates. */
  #collect(): number {
    const w = this.#w;
    let n = 0;
    if (this.#mayRun(this.thread)) this.#candidates[n++] = this.thread;
    for (let t = 0; t < w[THREADS]; t++) if (t !== this.thread && this.#mayRun(t)) this.#candidates[n++] = t;
    return n;
  }

  #mayRun(t: number): boolean {
    const w = this.#w;
    const at = THREAD_BASE + 16 * t;
    const state = w[at + STATE];
    return state === RUNNABLE || (state === SPINNING && w[PROGRESS] !== w[at + BLOCKED_AT]);
  }

  /** The next thread; −1 if nobody may run. */
  #pick(): number {
    const w = this.#w;
    const n = this.#collect();
    if (n === 0) return -1;
    if (n === 1 || w[QUIET] !== 0) return this.#candidates[0];
    let wanted = 0;
    if (w[STRATEGY] === RANDOM) wanted = nextRandom(w) % n;
    else if (w[STRATEGY] !== NONE) wanted = this.#highest(n);
    return this.#candidates[this.#choice(n, wanted, this.#candidates[0] === this.thread)];
  }

  /** PCT: the candidate of highest priority, after this step's change points. */
  #highest(n: number): number {
    const w = this.#w;
    for (let i = 0; i < w[CHANGES]; i++)
      if (w[CHANGE_AT + i] === w[STEPS]) w[this.#me + PRIORITY] = MAX_CHANGES - i;
    let best = 0;
    for (let i = 1; i < n; i++)
      if (
        w[THREAD_BASE + 16 * this.#candidates[i] + PRIORITY] >
        w[THREAD_BASE + 16 * this.#candidates[best] + PRIORITY]
      )
        best = i;
    return best;
  }

  #choice(options: number, wanted: number, preemptive: boolean): number {
    const w = this.#w;
    const at = w[CHOICES]++;
    const choice = at < w[GIVEN] ? w[GIVEN_BASE + at] % options : wanted;
    if (at < MAX_CHOICES) {
      w[CHOICE_BASE + 2 * at] = w[EVENTS] - 1;
      w[CHOICE_BASE + 2 * at + 1] = (options << 9) | (preemptive ? 0x100 : 0) | choice;
    }
    return choice;
  }

  #switchTo(next: number): void {
    const w = this.#w;
    w[SWITCHES]++;
    this.switched[(w[this.#me + POINT] << 5) | w[THREAD_BASE + 16 * next + POINT]]++;
    this.#go(next);
    this.#await();
  }

  /** This thread cannot go on: somebody else must. */
  #yield(): void {
    if (this.#w[STEPS] > this.#w[LIMIT]) this.#fail('livelock');
    const next = this.#pick();
    if (next < 0) this.#fail('deadlock');
    if (next !== this.thread) this.#switchTo(next);
    this.#w[this.#me + STATE] = RUNNABLE;
  }

  #go(next: number): void {
    const w = this.#w;
    store(w, THREAD_BASE + 16 * next + GO, 1);
    notify(w, THREAD_BASE + 16 * next + GO);
  }

  #await(): void {
    const w = this.#w;
    const go = this.#me + GO;
    while (load(w, go) === 0) wait(w, go, 0, 1000);
    store(w, go, 0);
    if (load(w, ABORT) !== 0) throw new ScheduleAborted();
  }

  #someoneWaits(): boolean {
    const w = this.#w;
    for (let t = 0; t < w[THREADS]; t++) {
      const state = w[THREAD_BASE + 16 * t + STATE];
      if (state !== ENDED && state !== ABSENT) return true;
    }
    return false;
  }

  #fail(why: ScheduleFailure): never {
    this.#giveUp(why);
    throw new ScheduleAborted();
  }

  #giveUp(why: ScheduleFailure): void {
    const w = this.#w;
    if (load(w, ABORT) !== 0) return;
    w[FAILED] = FAILURES.indexOf(why);
    store(w, ABORT, 1);
    for (let t = 0; t < w[THREADS]; t++) {
      if (t === this.thread) continue;
      store(w, THREAD_BASE + 16 * t + GO, 1);
      notify(w, THREAD_BASE + 16 * t + GO);
    }
  }
}
