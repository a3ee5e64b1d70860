/**
 * VMs that are driven step by step, on one thread: the caller changes something on the host's side, and virtual time goes
 * on as far as the work asks. The same code as a run but for who decides what happens next.
 */
import type { BlockStorage } from '@ebb/host-kvm';
import { InlineExitPort, inlineSchedule, NS_PER_MS, NS_PER_S } from '@ebb/machine';
import { UserError } from '../trace/trace.ts';
import { CpuSide } from './cpu-side.ts';
import { HostSide } from './host-side.ts';
import type { MemoryWatch } from './power-on.ts';
import type { RunBuffers, RunSpec } from './spec.ts';

/** What is due later than this is a timer, not work: virtual time does not run ahead to it by itself. */
const QUIET_NS: number = 5 * NS_PER_S;
/** Work that never ends (a balloon that retries every 200 ms) is left at it after this long. */
const PATIENCE_NS: number = 120 * NS_PER_S;

export class InlineSession {
  readonly host: HostSide;
  readonly #cpus: CpuSide;
  #nextDue = 0;

  constructor(
    spec: RunSpec,
    buffers: RunBuffers,
    storage: (vm: number, bytes: number) => BlockStorage,
    watch: MemoryWatch = {},
  ) {
    this.host = new HostSide(spec, buffers, storage, inlineSchedule, undefined, watch);
    this.#cpus = new CpuSide(
      spec,
      buffers,
      -1,
      new InlineExitPort(() => void this.host.poll()),
      inlineSchedule,
    );
  }

  get now(): number {
    return this.host.windowEnd;
  }

  /** Runs until no vCPU has work left; timers that are due later stay. */
  settle(): void {
    // Whatever changed outside is an interrupt that nobody has looked at yet.
    this.#window(this.now + NS_PER_MS);
    const patience = this.now + PATIENCE_NS;
    while (this.#nextDue < this.now + QUIET_NS && this.now < patience) this.#window(this.#nextDue);
  }

  /** Lets virtual time pass to `untilNs`, with every timer on the way. */
  passTo(untilNs: number): void {
    while (this.now < untilNs) this.#window(Math.min(this.#nextDue, untilNs));
    this.settle();
  }

  #window(due: number): void {
    if (!this.host.advance(due))
      throw new UserError(`the session ended: ${this.host.why}; give the host more memory`);
    this.#nextDue = this.#cpus.runWindow(this.host.windowEnd);
    while (this.host.poll());
  }
}
