/** The host of a vCPU that only exits or faults, in a thread of its own with the loop that it has in a run. */
import { HostWindows } from '../run/host-windows.ts';
import { smallMachine, type SmallMachine } from '../run/small-machine.ts';
import { exposeToParent } from '../run/worker-port.ts';

export class ExitHostWorker {
  #machine: SmallMachine | null = null;

  /** Makes a machine with `ramBytes` of guest RAM in small pages. */
  make(ramBytes: number): SmallMachine['buffers'] {
    this.#machine = smallMachine({ ramBytes, huge: 'never' });
    return this.#machine.buffers;
  }

  /** Serves the machine's one vCPU until that is done. */
  async serve(): Promise<void> {
    if (this.#machine === null) throw new Error('no machine was made');
    const { poll, tasks, buffers } = this.#machine;
    const host = { poll, tasks, windowEnd: Number.POSITIVE_INFINITY, anyKilled: false };
    await new HostWindows(host, 1, buffers.runControl, false).run();
  }
}

exposeToParent(new ExitHostWorker());
