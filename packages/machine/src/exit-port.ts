/**
 * How a vCPU hands an exit to the host and waits for the answer. The mailbox is in the control block; a port only
 * carries the notice and the waiting. Inline: pump the host's tasks. Threads: doorbell, spin, then sleep.
 */
import { nudgeSleepingHost } from './doorbell.ts';
import * as layout from './layout.ts';

// Local copies: docs/performance.md § Constants.
const { EXIT_DONE, EXIT_REQUEST, EXIT_REQUEST_SLEEPING, RC_STOP, VC_EXIT_STATE } = layout;

export interface ExitPort {
  /** The mailbox at `control[base…]` holds a request: returns when its state is `EXIT_DONE`. */
  call(control: Int32Array, base: number): void;
  /** Runs while the vCPU polls for something a sibling must do. */
  relax(): void;
  /** The vCPU is halted, outside guest mode: returns when the word may differ from `seen`. Bounded. */
  halt(control: Int32Array, word: number, seen: number): void;
}

/** Thrown inside a CPU worker when main has set `stop`: unwinds to the worker's loop. */
export class RunStopped extends Error {
  constructor() {
    super('the run was stopped');
    this.name = 'RunStopped';
  }
}

/** Longest single wait; a bounded wait notices `stop` and survives any lost wake-up. */
const WAIT_MS = 50;

/** The port of a vCPU in its own worker. `spins` is 20,000 if every thread has a core, else 300 (DESIGN §2). */
export class ThreadExitPort implements ExitPort {
  readonly #runControl: Int32Array;
  readonly #spins: number;

  constructor(runControl: Int32Array, spins: number) {
    this.#runControl = runControl;
    this.#spins = spins;
  }

  call(control: Int32Array, base: number): void {
    const state = base + VC_EXIT_STATE;
    // Store state, then load asleep: pairs with store asleep, then scan in the host's loop.
    nudgeSleepingHost(this.#runControl);
    for (let i = 0; i < this.#spins; i++) {
      if (Atomics.load(control, state) === EXIT_DONE) return;
      // Also keeps the looks apart: each takes the line from the host, which writes the answer and then DONE.
      this.#unlessStopped();
    }
    // Announces the sleep; the host notifies only if its exchange to DONE finds this value.
    if (Atomics.compareExchange(control, state, EXIT_REQUEST, EXIT_REQUEST_SLEEPING) !== EXIT_REQUEST) return;
    while (Atomics.load(control, state) !== EXIT_DONE) {
      Atomics.wait(control, state, EXIT_REQUEST_SLEEPING, WAIT_MS);
      this.#unlessStopped();
    }
  }

  relax(): void {
    this.#unlessStopped();
    Atomics.pause();
  }

  halt(control: Int32Array, word: number, seen: number): void {
    for (let i = 0; i < this.#spins; i++) if (Atomics.load(control, word) !== seen) return;
    Atomics.wait(control, word, seen, WAIT_MS);
    this.#unlessStopped();
  }

  /** Throws `RunStopped` once main has set `stop`, which nobody takes back. */
  #unlessStopped(): void {
    if (Atomics.load(this.#runControl, RC_STOP) !== 0) throw new RunStopped();
  }
}

/** The port of a vCPU that shares the host's thread: an exit runs host tasks until it is served. */
export class InlineExitPort implements ExitPort {
  readonly #pump: () => void;
  /** `pump` runs one round of host tasks. */
  constructor(pump: () => void) {
    this.#pump = pump;
  }

  call(control: Int32Array, base: number): void {
    for (let rounds = 0; control[base + VC_EXIT_STATE] !== EXIT_DONE; rounds++) {
      if (rounds > 1_000_000) throw new Error('deadlock: the host makes no progress on an exit');
      this.#pump();
    }
  }

  relax(): void {
    this.#pump();
  }

  halt(control: Int32Array, word: number, seen: number): void {
    for (let rounds = 0; control[word] === seen; rounds++) {
      if (rounds > 1_000_000) throw new Error('deadlock: a halted vCPU is never interrupted');
      this.#pump();
    }
  }
}
