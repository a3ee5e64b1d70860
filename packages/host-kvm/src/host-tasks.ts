/**
 * Host tasks: the host's work as generator coroutines on one thread. A task yields at every host lock, backing call,
 * flush wait, I/O and copy chunk; the loop may then run another, so no task is atomic with respect to another, and
 * waiting for one vCPU's acknowledgement never stops the service of the others. Leaves are plain functions.
 *
 * What a task yields: nothing (run me again later), `PARK` (until `wake`), or a function (until it returns true).
 */
import { assert, type Schedule } from '@ebb/machine';

export const PARK: unique symbol = Symbol('park');
/** A schedule point, a park, or a condition that the loop polls. */
export type TaskYield = undefined | typeof PARK | (() => boolean);
export type TaskBody = Generator<TaskYield, void, void>;

export class HostTask {
  /** Number in order of creation; names the task in a schedule's events. */
  readonly id: number;
  readonly name: string;
  readonly body: TaskBody;
  state: 'ready' | 'parked' | 'blocked' | 'running' | 'done' = 'ready';
  /** A wake that came while the task ran. */
  wakePending = false;
  condition: (() => boolean) | null = null;

  constructor(id: number, name: string, body: TaskBody) {
    this.id = id;
    this.name = name;
    this.body = body;
  }
}

/** Steps of a lone task before the host looks for exits again. */
const TURNS_ALONE = 64;

export class HostTasks {
  readonly #schedule: Schedule;
  #ready: HostTask[] = [];
  #next: HostTask[] = [];
  #blocked: HostTask[] = [];
  #spawned = 0;

  constructor(schedule: Schedule) {
    this.#schedule = schedule;
  }

  spawn(name: string, body: TaskBody): HostTask {
    const task = new HostTask(this.#spawned++, name, body);
    this.#next.push(task);
    return task;
  }

  /** Makes a parked task run. A wake during its own step is kept. */
  wake(task: HostTask): void {
    if (task.state === 'parked') {
      task.state = 'ready';
      this.#next.push(task);
    } else if (task.state === 'running' || task.state === 'ready') task.wakePending = true;
  }

  /** True if nothing can run: all parked, or blocked on a condition that does not hold. */
  get idle(): boolean {
    return (
      this.#next.length === 0 &&
      this.#ready.length === 0 &&
      !this.#blocked.some((task) => task.condition?.() === true)
    );
  }

  /** Where every task that has not ended is, for reports. */
  describe(): string {
    const names = (tasks: readonly HostTask[], what: string): string[] =>
      tasks.map((t) => `${t.name} ${what}`);
    return [...names(this.#next, 'ready'), ...names(this.#blocked, 'blocked')].join(', ') || 'no task';
  }

  /** True if a task waits for its turn. */
  get anyReady(): boolean {
    return this.#next.length > 0 || this.#ready.length > 0;
  }

  /** Runs every ready task for one step. Returns true if any ran. */
  step(): boolean {
    if (this.#blocked.length > 0) this.#unblock();
    const { length } = this.#next;
    if (length === 0) return false;
    if (this.#schedule.controlled) {
      // No order among ready tasks is promised: the schedule picks.
      const [task] = this.#next.splice(this.#schedule.choose(length), 1);
      this.#resume(task, false);
      return true;
    }
    if (length === 1) {
      // The common case, a lone fault or register access: no round to swap.
      const only = this.#next.pop();
      if (only !== undefined) this.#resume(only, true);
      return true;
    }
    const round = this.#next;
    this.#next = this.#ready;
    this.#ready = round;
    for (const task of round) this.#resume(task, false);
    round.length = 0;
    return true;
  }

  #unblock(): void {
    const still: HostTask[] = [];
    for (const task of this.#blocked) {
      if (task.condition?.() === true) {
        task.condition = null;
        task.state = 'ready';
        this.#next.push(task);
      } else still.push(task);
    }
    this.#blocked = still;
  }

  /** `alone`: no other task was ready when this one was chosen. */
  #resume(task: HostTask, alone: boolean): void {
    if (this.#schedule.controlled) this.#schedule.point('task-yield', task.id);
    task.state = 'running';
    let { done, value } = task.body.next();
    // With nobody else ready a yield is only a point: go on at once; not for ever, since exits are looked for in between.
    for (let n = 0; alone && n < TURNS_ALONE && done !== true && value === undefined; n++) {
      if (this.#next.length > 0) break;
      ({ done, value } = task.body.next());
    }
    if (done === true) {
      task.state = 'done';
    } else if (value === undefined) {
      task.state = 'ready';
      this.#next.push(task);
    } else if (value === PARK) {
      if (task.wakePending) {
        task.wakePending = false;
        task.state = 'ready';
        this.#next.push(task);
      } else task.state = 'parked';
    } else if (typeof value === 'function') {
      task.condition = value;
      task.state = 'blocked';
      this.#blocked.push(task);
    }
  }
}

/** A lock between host tasks; held across yields. Guards what its owner says it guards. */
export class TaskLock {
  readonly name: string;
  #held = false;

  constructor(name: string) {
    this.name = name;
  }

  get held(): boolean {
    return this.#held;
  }

  /** Takes the lock if it is free. For callers that have just yielded themselves. */
  tryAcquire(): boolean {
    if (this.#held) return false;
    this.#held = true;
    return true;
  }

  *acquire(): Generator<TaskYield, void, void> {
    yield undefined;
    while (this.#held) yield () => !this.#held;
    this.#held = true;
  }

  release(): void {
    assert(this.#held, `${this.name} is held`);
    this.#held = false;
  }
}
