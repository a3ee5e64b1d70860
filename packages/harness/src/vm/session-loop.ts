/**
 * A VM under monitors: executes what they ask between windows, and lets virtual time go on as far as the work asks. A
 * command waits until the guest has done what the one before asked, within patience, so that a script reads what it
 * caused; when nothing is left to do, virtual time follows the clock on the wall, so that timers come due as they would.
 */
import { Hmp, MonitorEvents, QmpConnection, type DimmNews } from '@ebb/host-kvm';
import { NS_PER_MS, NS_PER_S } from '@ebb/machine';
import type { HostSide } from '../run/host-side.ts';
import { turn } from '../run/worker-port.ts';
import { EBB_VERSION } from '../version.ts';
import type { VmDescription } from './command-line.ts';
import { VmMachine } from './vm-machine.ts';

/** What is due later than this is a timer, not work. */
const QUIET_NS: number = 5 * NS_PER_S;
/** Real time that a command waits for the guest to settle. */
const PATIENCE_MS = 10_000;
/** Longest sleep while there is nothing to do. */
const IDLE_MS = 20;

/** How windows are run: in threads or inline. */
export interface Windows {
  readonly nextDue: number;
  readonly othersDue: number;
  /** Runs the window that `advance` has opened; false: the run was stopped from outside. */
  run(): Promise<boolean>;
}

interface Job {
  readonly since: number;
  readonly run: () => void;
}

export class SessionLoop {
  readonly machine: VmMachine;
  readonly hmp: Hmp;
  readonly #description: VmDescription;
  readonly #host: HostSide;
  readonly #windows: Windows;
  readonly #connections = new Map<number, QmpConnection>();
  #nextConnection = 1;
  readonly #jobs: Job[] = [];
  #wake: () => void = () => undefined;
  #eventText = '';
  /** No more events come. */
  #over = false;
  #eventWaiter: ((text: string) => void) | null = null;
  /** The host was told something that guests have not looked at. */
  #poked = true;

  constructor(description: VmDescription, host: HostSide, windows: Windows) {
    this.#description = description;
    this.#host = host;
    this.#windows = windows;
    // The wall clock stamps events; nothing in the machine depends on it.
    const events = new MonitorEvents(
      (text) => this.#emit(text),
      () => Date.now(),
    );
    this.machine = new VmMachine(description, host, events);
    this.hmp = new Hmp(this.machine, description.dialect);
  }

  /** A memory device has another size. */
  sizeChanged(id: string, size: number): void {
    this.machine.emit({
      event: 'MEMORY_DEVICE_SIZE_CHANGE',
      data: { id, size, 'qom-path': `/machine/peripheral/${id}` },
    });
  }

  /** The guest or a slot has news of a DIMM. */
  dimmNews(news: DimmNews): void {
    this.machine.dimmNews(news);
  }

  /** The balloon has another size, as the guest says. */
  balloonChanged(actualBytes: number): void {
    this.machine.emit({ event: 'BALLOON_CHANGE', data: { actual: actualBytes } });
  }

  // ── Monitors ─────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Queues work for between windows. */
  do<T>(run: () => T): Promise<T> {
    return new Promise((resolve) => {
      this.#jobs.push({ since: performance.now(), run: () => resolve(run()) });
      this.#wake();
    });
  }

  openQmp(): { id: number; greeting: string } {
    const connection = new QmpConnection({
      machine: this.machine,
      dialect: this.#description.dialect,
      version: EBB_VERSION,
    });
    const id = this.#nextConnection++;
    this.#connections.set(id, connection);
    return { id, greeting: connection.greeting() };
  }

  /** Takes a connection's input; the answers, and whether it wants events from now on. */
  feedQmp(id: number, text: string): { text: string; negotiated: boolean } {
    const connection = this.#connections.get(id);
    if (connection === undefined) return { text: '', negotiated: false };
    const answers = connection.feed(text);
    return { text: answers, negotiated: connection.negotiated };
  }

  closeQmp(id: number): void {
    this.#connections.delete(id);
  }

  /** The next events, as text for every connection that has negotiated; empty when the session is over. */
  nextEvents(): Promise<string> {
    if (this.#eventText !== '' || this.#over) {
      const text = this.#eventText;
      this.#eventText = '';
      return Promise.resolve(text);
    }
    return new Promise((resolve) => {
      this.#eventWaiter = resolve;
    });
  }

  #emit(text: string): void {
    this.#eventText += text;
    if (this.#eventWaiter === null) return;
    this.#eventWaiter(this.#eventText);
    this.#eventWaiter = null;
    this.#eventText = '';
  }

  // ── The loop ─────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Runs until a monitor says quit. Why it ended otherwise, or empty. */
  async run(): Promise<string> {
    const why = await this.#untilQuit();
    if (this.machine.quitting) {
      // The answer to `quit` goes out before the news that it is over.
      await turn();
      this.machine.shutDown();
    }
    this.#over = true;
    this.#emit('');
    return why;
  }

  async #untilQuit(): Promise<string> {
    const { machine } = this;
    let wall = performance.now();
    while (!machine.quitting) {
      const due = Math.min(this.#windows.nextDue, machine.events.nextDue());
      const settled = !this.#poked && due > this.#host.windowEnd + QUIET_NS;
      machine.settled = settled;
      const [job] = this.#jobs;
      if (job !== undefined && (settled || !machine.running || performance.now() - job.since > PATIENCE_MS)) {
        this.#jobs.shift();
        job.run();
        this.#poked = true;
        continue;
      }
      if (!machine.running) {
        await this.#sleep();
        wall = performance.now();
        continue;
      }
      if (!settled) {
        if (!(await this.#window(this.#poked ? this.#host.windowEnd + NS_PER_MS : due))) return 'stopped';
        if (this.#host.why !== '') return this.#host.why;
        wall = performance.now();
        continue;
      }
      await this.#sleep();
      // Virtual time follows the wall's while there is nothing to do.
      const passed = (performance.now() - wall) * NS_PER_MS;
      if (due <= this.#host.windowEnd + passed) {
        if (!(await this.#window(due))) return 'stopped';
        wall = performance.now();
      }
    }
    return '';
  }

  async #window(due: number): Promise<boolean> {
    this.#poked = false;
    if (!this.#host.advance(due, due)) return true;
    const goesOn = await this.#windows.run();
    this.machine.events.flush(this.#host.windowEnd);
    return goesOn;
  }

  #sleep(): Promise<void> {
    if (this.#jobs.length > 0) return Promise.resolve();
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, IDLE_MS);
      this.#wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}
