/** One thread of a controlled execution: the host, or a vCPU. Lives through many executions; told of each by Comlink. */
import {
  ControlledSchedule,
  LockOrder,
  observedAtomics,
  observeLocks,
  observeViews,
  plainView,
  RaceDetector,
  regionOf,
  resetRaces,
  ScheduleAborted,
  ScheduleBuffer,
  type ScheduleOutcome,
  type ScheduleStart,
} from '@ebb/machine';
import { exposeToParent } from '../run/worker-port.ts';
import { HostLab } from './host-lab.ts';
import { VcpuLab } from './vcpu-lab.ts';
import { resetLab, type LabBuffers } from './lab.ts';
import { findProperty } from './properties.ts';
import { describeRace, racyByDesign } from './racy.ts';
import { wordName } from './word-names.ts';
import { Series } from './series.ts';
import type { FuzzProgram } from './property.ts';

/** One execution: what runs, under which schedule, and whether races are looked for: slower by a factor of a few. */
export interface Execution {
  readonly program: FuzzProgram;
  readonly start: ScheduleStart;
  readonly observe: boolean;
}

/** What a thread found in one execution: violations in words, also if it was given up, and a crash if it had one. */
interface ThreadResult {
  readonly found: readonly string[];
  readonly crash: string;
  /** Thread 0, if the execution was given up: what the host's tasks waited for. */
  readonly stuck: string;
  /** Switches by pair of points; see `ControlledSchedule.switched`. */
  readonly switched: Int32Array;
}

/** The same of a series: what its last execution found, and the switches of all. */
export interface SeriesResult extends ThreadResult {
  /** Of thread 0: the executions in which nothing was found, in order. The series ends with the first other. */
  readonly held: readonly Pick<ScheduleOutcome, 'steps' | 'hash'>[];
}

let schedule: ControlledSchedule | null = null;
let races: RaceDetector | null = null;
globalThis.Atomics = observedAtomics(
  () => schedule,
  (view, index) =>
    (regionOf(view.buffer) << 24) | (((view.byteOffset + index * view.BYTES_PER_ELEMENT) >>> 2) & 0xff_ffff),
  plainView,
  { atomic: (view, index, id, reads, writes) => races?.atomic(view, index, id, reads, writes) },
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
  runSeries(executions: readonly Execution[]): SeriesResult {
    const lab = this.#lab as LabBuffers;
    const series = new Series(lab.series, 1 + lab.shape.vms * lab.shape.vcpus);
    const switched = new Int32Array(1024);
    const held: { steps: number; hash: number }[] = [];
    const buffer = new ScheduleBuffer(lab.schedule);
    let last: ThreadResult = { found: [], crash: '', stuck: '', switched };
    for (const [i, { program, start, observe }] of executions.entries()) {
      if (this.#thread === 0) {
        resetLab(lab);
        if (observe) resetRaces(lab.races);
        buffer.prepare(start);
        series.begin(i + 1);
      } else if (!series.awaitBegin(i + 1)) break;
      last = this.#run(program, observe);
      for (let pair = 0; pair < 1024; pair++) switched[pair] += last.switched[pair];
      series.end(last.crash !== '' || last.found.length > 0);
      if (this.#thread !== 0) continue;
      const found = series.awaitEnd(i + 1);
      const { failure, steps, hash } = buffer.summary();
      if (found || failure !== '') break;
      held.push({ steps, hash });
    }
    if (this.#thread === 0) series.over();
    return { ...last, switched, held };
  }

  /** Runs this thread's part of one program under the schedule prepared in the lab's buffer. */
  #run(program: FuzzProgram, observe: boolean): ThreadResult {
    const lab = this.#lab as LabBuffers;
    const property = findProperty(this.#property);
    const control = new ControlledSchedule(lab.schedule, this.#thread);
    const found: string[] = [];
    let crash = '';
    let stuck = '';
    let host: HostLab | null = null;
    let cpu: VcpuLab | null = null;
    const { ramPages } = lab.shape;
    const racy = racyByDesign(ramPages, property.hostileRings === true);
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
      stopLooking();
    };
    const stopLooking = (): void => {
      if (schedule === null) return;
      schedule = null;
      for (const race of races?.races ?? []) found.push(describeRace(race, ramPages));
      for (const cycle of order.cycles)
        found.push(
          `lock order: ${cycle.map((word) => wordName('arena', word, ramPages)).join(' → ')} are taken in a circle (I23)`,
        );
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
        cpu = new VcpuLab(lab, control, vm, id);
        begin();
        property.cpu(cpu, program, vm, id);
        cpu.finish();
        finish();
        found.push(...cpu.found);
      }
    } catch (error) {
      stopLooking();
      if (!(error instanceof ScheduleAborted)) {
        crash = error instanceof Error ? `${error.message}\n${error.stack ?? ''}` : String(error);
        control.abandon();
      } else if (host !== null) {
        found.push(...host.noticed());
        stuck = `host tasks: ${host.tasks.describe()}`;
      } else if (cpu !== null) found.push(...cpu.found);
    }
    return { found, crash, stuck, switched: control.switched };
  }
}

exposeToParent(new FuzzWorker());
