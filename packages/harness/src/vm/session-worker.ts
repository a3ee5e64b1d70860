/** The host worker of a VM under monitors. */
import { orderPins } from '../run/agent-program.ts';
import { fileStorage } from '../run/file-storage.ts';
import { HostSide } from '../run/host-side.ts';
import { HostWindows } from '../run/host-windows.ts';
import type { RunBuffers, RunSpec } from '../run/spec.ts';
import { exposeToParent } from '../run/worker-port.ts';
import type { VmDescription } from './command-line.ts';
import { SessionLoop } from './session-loop.ts';

export interface SessionEnd {
  readonly why: string;
  readonly ledgerViolations: number;
  readonly violations: readonly string[];
}

export class SessionWorker {
  #loop: SessionLoop | null = null;
  #orders: Int32Array = new Int32Array(0);
  #open: (loop: SessionLoop) => void = () => undefined;
  readonly #opened = new Promise<SessionLoop>((resolve) => {
    this.#open = resolve;
  });

  /** Runs the VM until a monitor says quit, or until `stop`. */
  async run(
    description: VmDescription,
    spec: RunSpec,
    buffers: RunBuffers,
    crowded: boolean,
  ): Promise<SessionEnd> {
    const host = new HostSide(spec, buffers, (_vm, bytes) => fileStorage(bytes), undefined, undefined, {
      size: (id, bytes) => this.#loop?.sizeChanged(id, bytes),
      balloon: (bytes) => this.#loop?.balloonChanged(bytes),
      dimm: (news) => this.#loop?.dimmNews(news),
    });
    this.#orders = new Int32Array(buffers.handles[0]);
    const windows = new HostWindows(host, spec.workers, buffers.runControl, crowded);
    this.#loop = new SessionLoop(description, host, windows);
    this.#open(this.#loop);
    const why = await this.#loop.run();
    windows.end();
    const { ledgerViolations, violations } = host.result();
    return { why, ledgerViolations, violations };
  }

  /** Has the guest keep a page in use in each of these sub-blocks, once it has settled. */
  async hold(pfns: readonly number[]): Promise<void> {
    const loop = await this.#opened;
    await loop.do(() => orderPins(this.#orders, pfns));
  }
  async hmp(line: string): Promise<string> {
    const loop = await this.#opened;
    return loop.do(() => loop.hmp.execute(line));
  }
  async openQmp(): Promise<{ id: number; greeting: string }> {
    return (await this.#opened).openQmp();
  }
  async feedQmp(id: number, text: string): Promise<{ text: string; negotiated: boolean }> {
    const loop = await this.#opened;
    return loop.do(() => loop.feedQmp(id, text));
  }
  async closeQmp(id: number): Promise<void> {
    (await this.#opened).closeQmp(id);
  }
  async nextEvents(): Promise<string> {
    return (await this.#opened).nextEvents();
  }
}

exposeToParent(new SessionWorker());
