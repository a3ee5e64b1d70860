/**
 * Runs executions of one property: real workers, one per thread of the property, kept from one execution to the next.
 */
import { ScheduleBuffer, type ScheduleOutcome, type ScheduleStart } from '@ebb/machine';
import { spawnWorker, type SpawnedWorker } from '../run/worker-endpoint.ts';
import type { Execution, FuzzWorker, SeriesResult } from './fuzz-worker.ts';
import { labBuffers, type LabBuffers } from './lab.ts';
import { findProperty } from './properties.ts';
import { Series } from './series.ts';
import type { Property } from './property.ts';

export interface Outcome extends ScheduleOutcome {
  /** What went wrong, in words; empty: the property held. */
  readonly found: readonly string[];
}

/** An execution as those who search plan it: threads and limit are the stage's. */
export type Planned = Omit<Execution, 'start'> & Omit<ScheduleStart, 'threads' | 'limit'>;

/** Steps after which an execution is a livelock. */
const STEP_LIMIT = 200_000;

export class Stage {
  readonly property: Property;
  readonly buffer: ScheduleBuffer;
  /** Switches seen, by pair of points. */
  readonly switched: Int32Array = new Int32Array(1024);
  readonly #lab: LabBuffers;
  readonly #workers: SpawnedWorker<FuzzWorker>[] = [];

  constructor(name: string) {
    this.property = findProperty(name);
    this.#lab = labBuffers(this.property.shape);
    this.buffer = new ScheduleBuffer(this.#lab.schedule);
  }

  get threads(): number {
    return 1 + this.property.shape.vms * this.property.shape.vcpus;
  }

  async open(): Promise<void> {
    for (let t = 0; t < this.threads; t++)
      this.#workers.push(spawnWorker<FuzzWorker>('../fuzz/fuzz-worker', t === 0 ? 'host' : `vcpu${t - 1}`));
    await Promise.all(this.#workers.map((w, t) => this.#race(w.api.open(this.property.name, this.#lab, t))));
  }

  #race<T>(call: Promise<T>): Promise<T> {
    return Promise.race([call, ...this.#workers.map((w) => w.died)]);
  }

  /** One execution. */
  async run(execution: Planned): Promise<Outcome> {
    return (await this.runSeries([execution])).last;
  }

  /** Executions one after another, until one finds something: how those before it went, and all of the last. */
  async runSeries(
    executions: readonly Planned[],
  ): Promise<{ readonly held: SeriesResult['held']; readonly last: Outcome }> {
    new Series(this.#lab.series, this.threads).reset();
    const series: Execution[] = executions.map(({ program, observe, ...start }) => ({
      program,
      observe,
      start: { ...start, threads: this.threads, limit: STEP_LIMIT },
    }));
    const results = await this.#race(Promise.all(this.#workers.map((w) => w.api.runSeries(series))));
    for (const { switched } of results) for (let i = 0; i < 1024; i++) this.switched[i] += switched[i];
    return { held: results[0].held, last: this.#outcome(results) };
  }

  /** What became of the last execution. */
  #outcome(results: readonly SeriesResult[]): Outcome {
    const outcome = this.buffer.outcome();
    const crashes: string[] = [];
    const noticed: string[] = [];
    const stuck: string[] = [];
    for (const [t, r] of results.entries()) {
      if (r.crash !== '') crashes.unshift(`${this.#workers[t].name} crashed: ${r.crash.split('\n')[0]}`);
      noticed.push(...r.found);
      if (r.stuck !== '') stuck.push(r.stuck);
    }
    if (outcome.failure === 'deadlock' || outcome.failure === 'livelock') {
      const where = outcome.positions.map((p, t) => `${this.#workers[t].name} ${p}`).join('; ');
      stuck.unshift(
        outcome.failure === 'deadlock'
          ? `deadlock or lost wake-up: nobody can run: ${where}`
          : `livelock: ${outcome.steps} steps and no end: ${where}`,
      );
    }
    // What a check names comes first: threads that wait for ever are often what came of it.
    const found = [...crashes, ...noticed, ...stuck];
    return { ...outcome, found };
  }

  async close(): Promise<void> {
    await Promise.all(this.#workers.map((w) => w.close()));
  }
}
