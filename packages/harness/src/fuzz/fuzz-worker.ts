/** One thread of a controlled execution: the host, or a vCPU. Lives through many executions; told of each by Comlink. */
import {
  ControlledSchedule,
  resetRaces,
  ScheduleBuffer,
  LockOrder,
  observedAtomics,
  observeLocks,
  observeViews,
  plainView,
  RaceDetector,
  regionOf,
  ScheduleAborted,
  type ScheduleStart,
} from '@ebb/machine';
import { exposeToParent } from '../run/worker-port.ts';
import { HostLab, resetLab, VcpuLab, type LabBuffers } from './lab.ts';
import { Series } from './series.ts';
import { findProperty } from './properties.ts';
import { describeRace, racyByDesign } from './racy.ts';
import type { FuzzProgram } from './property.ts';

/** What a thread found: violations in words, and a crash if it had one. */
export interface ThreadResult {
  readonly found: readonly string[];
  readonly crash: string;
  /** Switches by pair of points; see `ControlledSchedule.switched`. */
  readonly switched: Int32Array;
}

/** One execution of a series: what runs, under which schedule, and whether races are looked for. */
export interface SeriesRun {
  readonly program: FuzzProgram;
  readonly start: ScheduleStart;
  readonly observe: boolean;
}

/** What a thread tells of a series. */
export interface SeriesResult {
  readonly switched: Int32Array;
  /** Of thread 0: the executions in which nothing was found, in order. The series ends at the first other. */
  readonly held: readonly { readonly steps: number; readonly switches: number; readonly hash: number }[];
}

let schedule: ControlledSchedule | null = null;
let races: RaceDetector | null = null;
globalThis.Atomics = observedAtomics(
  () => schedule,
  (words, index) => (regionOf(words.buffer) << 24) | ((words.byteOffset / 4 + index) & 0xff_ffff),
  plainView,
  {
    atomic: (view, index, id, reads, writes) => races?.atomic(view, index, id, reads, writes),
  },
);
observeViews((region, view) => (races === null ? view : races.observe(region, view)));

export class FuzzWorker {
  #lab: LabBuffers | null = null;
  #property = '';
  #thread = 0;

  /** Gives this worker its thread number and the buffers of a property. */
  open(property: string, lab: LabBuffers, thread: number): void {
    this.#property = property;
    this.#lab = lab;
    this.#thread = thread;
  }

  /** Runs this thread's part of one execution after another, until one finds something. */
  runSeries(runs: readonly SeriesRun[]): SeriesResult {
    const lab = this.#lab as LabBuffers;
    const series = new Series(lab.series, 1 + lab.shape.vms * lab.shape.vcpus);
    const switched = new Int32Array(1024);
    const part = ({ program, observe }: SeriesRun): void => {
      const result = this.run(program, observe);
      for (let i = 0; i < 1024; i++) switched[i] += result.switched[i];
      series.end(result.crash !== '' || result.found.length > 0);
    };
    const held: { steps: number; switches: number; hash: number }[] = [];
    if (this.#thread !== 0) {
      for (const [i, run] of runs.entries()) {
        if (!series.awaitBegin(i + 1)) break;
        part(run);
      }
      return { switched, held };
    }
    const buffer = new ScheduleBuffer(lab.schedule);
    for (const [i, run] of runs.entries()) {
      resetLab(lab);
      if (run.observe) resetRaces(lab.races);
      buffer.prepare(run.start);
      series.begin(i + 1);
      part(run);
      const found = series.awaitEnd(i + 1);
      const { failure, steps, switches, hash } = buffer.summary();
      if (found || failure !== '') break;
      held.push({ steps, switches, hash });
    }
    series.over();
    return { switched, held };
  }

  /** Runs this thread's part of one program under the schedule prepared in the lab's buffer. `observe`: look for races. */
  run(program: FuzzProgram, observe: boolean): ThreadResult {
    const lab = this.#lab as LabBuffers;
    const property = findProperty(this.#property);
    const control = new ControlledSchedule(lab.schedule, this.#thread);
    const found: string[] = [];
    let crash = '';
    let host: HostLab | null = null;
    const racy = racyByDesign(lab.shape.ramPages, property.hostileRings === true);
    races = observe ? new RaceDetector(lab.races, this.#thread, racy) : null;
    const order = new LockOrder(lab.lockOrder);
    const begin = (): void => {
      observeLocks(order);
      schedule = control;
      control.start();
      if (races !== null) races.active = true;
    };
    const finish = (): void => {
      control.end();
      schedule = null;
      for (const race of races?.races ?? []) found.push(describeRace(race));
      for (const cycle of order.cycles)
        found.push(`lock order: arena words ${cycle.join(' → ')} are taken in a circle (I23)`);
      observeLocks(null);
      races = null;
    };
    try {
      if (this.#thread === 0) {
        host = new HostLab(lab, control, (first, count) => races?.forget(first, count));
        const verdict = property.host(host, program);
        begin();
        host.serve();
        finish();
        found.push(...host.audit(), ...verdict());
      } else {
        const vm = Math.floor((this.#thread - 1) / lab.shape.vcpus);
        const id = (this.#thread - 1) % lab.shape.vcpus;
        const cpu = new VcpuLab(lab, control, vm, id);
        begin();
        property.cpu(cpu, program, vm, id);
        cpu.finish();
        finish();
        found.push(...cpu.found);
      }
    } catch (error) {
      schedule = null;
      if (!(error instanceof ScheduleAborted)) {
        crash = error instanceof Error ? `${error.message}\n${error.stack ?? ''}` : String(error);
        control.abandon();
      } else if (host !== null) {
        if (host.log.total > 0) found.push(`${host.log.total} violation(s) before it was given up`);
        found.push(`host tasks: ${host.tasks.describe()}`);
      }
    }
    return { found, crash, switched: control.switched };
  }
}

exposeToParent(new FuzzWorker());
