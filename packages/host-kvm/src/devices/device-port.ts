/** What every device model of this host is given: never the VM itself. */
import type { CostTable } from '@ebb/machine';
import type { TaskBody, TaskYield } from '../host-tasks.ts';

export interface DevicePort {
  /** Starts a host task. */
  spawn(name: string, body: TaskBody): void;
  /** Virtual time of the register write being served: when the device was kicked. */
  now(): number;
  readonly costs: CostTable;
}

/** The part of a VM's memory that a balloon may give back. */
export interface DiscardPort {
  /** Pages of boot memory, holes excluded. */
  readonly ramPages: number;
  /** One more than the highest page there may ever be RAM at: holes and regions that come and go. `ramPages` without it. */
  readonly endPfn?: number;
  /** Pages of the backing's unit: 1, or 512 for fixed 2 MiB pages. */
  readonly unitPages: number;
  /** See `Vm.discard`: ascending, disjoint `[gfn, count]` runs; returns pages freed, after the flush. */
  discard(runs: Int32Array, nrRuns: number): Generator<TaskYield, number, void>;
}

/**
 * Virtual completion times of one device: a request completes at max(kick, device free) + cost. Each queue is served in
 * order by one task at a time.
 */
export class DeviceTimeline {
  #free = 0;

  /** Completion time of a request kicked at `kick` that takes `cost`. */
  complete(kick: number, cost: number): number {
    this.#free = Math.max(kick, this.#free) + cost;
    return this.#free;
  }
}

/** Runs one task per queue at a time; a kick during a run makes it look once more. `serve` is told when the kick came. */
export class QueueRunner {
  readonly #port: DevicePort;
  readonly #name: string;
  readonly #serve: (index: number, kicked: number) => Generator<TaskYield, void, void>;
  readonly #kicked: number[] = [];
  readonly #state: ('idle' | 'running' | 'again')[] = [];

  constructor(
    port: DevicePort,
    name: string,
    serve: (index: number, kicked: number) => Generator<TaskYield, void, void>,
  ) {
    this.#port = port;
    this.#name = name;
    this.#serve = serve;
  }

  /** No queue is being served. */
  get idle(): boolean {
    return this.#state.every((state) => state === 'idle');
  }

  kick(index: number): void {
    this.#kicked[index] = this.#port.now();
    if ((this.#state[index] ?? 'idle') !== 'idle') {
      this.#state[index] = 'again';
      return;
    }
    this.#state[index] = 'running';
    this.#port.spawn(`${this.#name}/queue${index}`, this.#run(index));
  }

  *#run(index: number): TaskBody {
    do {
      this.#state[index] = 'running';
      yield* this.#serve(index, this.#kicked[index]);
    } while (this.#state[index] === ('again' as string));
    this.#state[index] = 'idle';
  }
}
