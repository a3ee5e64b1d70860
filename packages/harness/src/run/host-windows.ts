/**
 * The host's side of a window in threads: serves exits and runs host tasks until every worker has reached its end.
 *
 * Waiting (DESIGN § 2): serve; pause; spin 15,000 polls; then read the doorbell, set `asleep`, scan once more, and await the
 * bell with a bound. With more threads than cores it spins only briefly while guests are at work: they need the core.
 */
import {
  RC_DOORBELL,
  RC_HOST_ASLEEP,
  RC_STOP,
  RC_WINDOW,
  RC_WINDOW_UNTIL_F64,
  RC_WORKER,
  RC_WORKER_DONE,
  RC_WORKER_NEXT_DUE_F64,
  RC_WORKER_STRIDE,
  sharedF64,
  sharedI32,
} from '@ebb/machine';
import type { HostTasks } from '@ebb/host-kvm';
import type { HostSide } from './host-side.ts';
import { turn } from './worker-port.ts';

const WAIT_MS = 50;
const TURN_EVERY_MS = 1;
const SPINS_SPARE_CORES = 15_000;
const SPINS_CROWDED = 300;

/** The host as its loop sees it. */
export type WindowHost = Pick<HostSide, 'anyKilled' | 'poll' | 'windowEnd'> & {
  readonly tasks: Pick<HostTasks, 'idle'>;
};

export class HostWindows {
  /** The earliest thing any vCPU still has to do, and the same without the worker that has it. */
  nextDue = Number.POSITIVE_INFINITY;
  othersDue = Number.POSITIVE_INFINITY;
  readonly #host: WindowHost;
  readonly #workers: number;
  readonly #spins: number;
  readonly #runControl: Int32Array;
  readonly #runF64: Float64Array;
  #window = 0;
  #lastTurn: number = performance.now();

  /** `crowded`: more threads than cores. */
  constructor(host: WindowHost, workers: number, runControl: SharedArrayBuffer, crowded: boolean) {
    this.#host = host;
    this.#workers = workers;
    this.#spins = crowded ? SPINS_CROWDED : SPINS_SPARE_CORES;
    this.#runControl = sharedI32('run-control', runControl);
    this.#runF64 = sharedF64('run-control', runControl);
  }

  #allDone(): boolean {
    for (let w = 0; w < this.#workers; w++) {
      // Pairs with the worker's store of `done`, which follows its `nextDue`.
      const done = Atomics.load(this.#runControl, RC_WORKER + w * RC_WORKER_STRIDE + RC_WORKER_DONE);
      if (done !== this.#window) return false;
    }
    return true;
  }

  /** Opens the window that `host.advance` has set and serves it to its end. False: main stopped the run. */
  async run(): Promise<boolean> {
    const host = this.#host;
    const runControl = this.#runControl;
    this.#window++;
    this.#runF64[RC_WINDOW_UNTIL_F64] = host.windowEnd;
    Atomics.store(runControl, RC_WINDOW, this.#window);
    Atomics.notify(runControl, RC_WINDOW);
    for (let end = this.#serve(); end !== 'over'; end = this.#serve()) {
      if (end === 'stopped') return false;
      const bell = Atomics.load(runControl, RC_DOORBELL);
      Atomics.store(runControl, RC_HOST_ASLEEP, 1);
      if (!host.poll() && !(this.#allDone() && host.tasks.idle)) await sleep(runControl, bell);
      Atomics.store(runControl, RC_HOST_ASLEEP, 0);
      this.#lastTurn = performance.now();
    }
    this.#gatherDue();
    if (performance.now() - this.#lastTurn > TURN_EVERY_MS) {
      await turn();
      this.#lastTurn = performance.now();
    }
    return true;
  }

  /** Serves until the window is over, main stops the run, or nothing came for so many looks that the host may sleep. */
  #serve(): 'over' | 'stopped' | 'idle' {
    const host = this.#host;
    for (let idle = 0; idle < this.#spins; ) {
      const found = host.poll();
      // Nobody who was just answered asks again within 50 ns; a look meanwhile takes the line away (docs/performance.md § Lines).
      if (found) Atomics.pause();
      const done = this.#allDone();
      if (Atomics.load(this.#runControl, RC_STOP) !== 0) return 'stopped';
      if (found) idle = 0;
      // A dead VM's locks are held for ever: its siblings are stopped, not waited for.
      else if ((done && host.tasks.idle) || host.anyKilled) return 'over';
      else idle++;
    }
    return 'idle';
  }

  #gatherDue(): void {
    this.nextDue = Number.POSITIVE_INFINITY;
    this.othersDue = Number.POSITIVE_INFINITY;
    for (let w = 0; w < this.#workers; w++) {
      const due = this.#runF64[(RC_WORKER + w * RC_WORKER_STRIDE) / 2 + RC_WORKER_NEXT_DUE_F64];
      if (due < this.nextDue) {
        this.othersDue = this.nextDue;
        this.nextDue = due;
      } else if (due < this.othersDue) this.othersDue = due;
    }
  }

  /** Tells the workers that the run is over. */
  end(): void {
    Atomics.store(this.#runControl, RC_STOP, 1);
    Atomics.notify(this.#runControl, RC_WINDOW);
  }
}

/** Waits for the bell to move from `seen`, without blocking the event loop. Bounded. */
async function sleep(runControl: Int32Array, seen: number): Promise<void> {
  const waiting = Atomics.waitAsync(runControl, RC_DOORBELL, seen, WAIT_MS);
  if (waiting.async) await waiting.value;
}
