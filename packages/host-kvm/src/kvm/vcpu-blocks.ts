/**
 * The host's side of the vCPU control blocks of one VM: what a vCPU asks at an exit and the answer, interrupts, and flush
 * requests. The other side is `Vcpu` in `machine`, whose `layout.ts` names each word and its writer.
 */
import * as machineWords from '@ebb/machine';
import { sharedF64, sharedI32, type Schedule } from '@ebb/machine';

// Local copies: docs/performance.md § Constants.
const {
  EXIT_DONE,
  EXIT_REQUEST,
  EXIT_REQUEST_SLEEPING,
  MODE_OUTSIDE,
  VC_CLOCK_F64,
  VC_EPT_ROOT,
  VC_EXIT_ADDR_F64,
  VC_EXIT_COST_F64,
  VC_EXIT_DATA,
  VC_EXIT_RDATA,
  VC_EXIT_REASON,
  VC_EXIT_RESULT,
  VC_EXIT_SIZE,
  VC_EXIT_STATE,
  VC_FLUSH_ACK,
  VC_FLUSH_REQ,
  VC_IRQ,
  VC_IRQ_DUE_F64,
  VC_MODE,
  VCPU_BLOCK_BYTES,
  VCPU_BLOCK_WORDS,
} = machineWords;

export class VcpuBlocks {
  readonly count: number;
  readonly #control: Int32Array;
  readonly #controlF64: Float64Array;
  readonly #firstBlock: number;
  readonly #schedule: Schedule;

  /** `firstBlock`: number of the VM's first block in the run's control memory. */
  constructor(control: SharedArrayBuffer, firstBlock: number, count: number, schedule: Schedule) {
    this.count = count;
    this.#control = sharedI32('vcpu-control', control);
    this.#controlF64 = sharedF64('vcpu-control', control);
    this.#firstBlock = firstBlock;
    this.#schedule = schedule;
  }

  #base(vcpu: number): number {
    return (this.#firstBlock + vcpu) * VCPU_BLOCK_WORDS;
  }
  #baseF64(vcpu: number): number {
    return ((this.#firstBlock + vcpu) * VCPU_BLOCK_BYTES) / 8;
  }

  /** Frame of the EPT's root. Before the vCPUs run. */
  setRoot(root: number): void {
    for (let v = 0; v < this.count; v++) this.#control[this.#base(v) + VC_EPT_ROOT] = root;
  }

  /** Virtual clock of a vCPU in ns, as of its last exit or halt. */
  clock(vcpu: number): number {
    return this.#controlF64[this.#baseF64(vcpu) + VC_CLOCK_F64];
  }

  /** The latest of the vCPUs' clocks, in ns: what the VM's devices call now. */
  now(): number {
    let latest = 0;
    for (let v = 0; v < this.count; v++) latest = Math.max(latest, this.clock(v));
    return latest;
  }

  // ── Exits ────────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Whether the vCPU waits for an answer. Pairs with its store of `EXIT_REQUEST`. */
  asks(vcpu: number): boolean {
    const state = Atomics.load(this.#control, this.#base(vcpu) + VC_EXIT_STATE);
    return state === EXIT_REQUEST || state === EXIT_REQUEST_SLEEPING;
  }

  /** Guest-physical address of the access that exited. */
  exitAddress(vcpu: number): number {
    return this.#controlF64[this.#baseF64(vcpu) + VC_EXIT_ADDR_F64];
  }
  exitReason(vcpu: number): number {
    return this.#control[this.#base(vcpu) + VC_EXIT_REASON];
  }
  /** Width of a register access; for a violation, not 0 if it was a write. */
  exitSize(vcpu: number): number {
    return this.#control[this.#base(vcpu) + VC_EXIT_SIZE];
  }
  exitData(vcpu: number): number {
    return this.#control[this.#base(vcpu) + VC_EXIT_DATA];
  }

  /** Answers an exit. `cost`: virtual ns. Exchanging to DONE tells whether the vCPU sleeps; only then is it notified. */
  answer(vcpu: number, result: number, data: number, cost: number): void {
    const base = this.#base(vcpu);
    this.#control[base + VC_EXIT_RESULT] = result;
    this.#control[base + VC_EXIT_RDATA] = data;
    this.#controlF64[this.#baseF64(vcpu) + VC_EXIT_COST_F64] = cost;
    const old = Atomics.exchange(this.#control, base + VC_EXIT_STATE, EXIT_DONE);
    if (old === EXIT_REQUEST_SLEEPING) Atomics.notify(this.#control, base + VC_EXIT_STATE);
  }

  // ── Interrupts ───────────────────────────────────────────────────────────────────────────────────────────────────

  /** Notes that device `line` completes what it returned at virtual time `due`, in ns. */
  completed(line: number, due: number): void {
    const f64 = this.#baseF64(0) + VC_IRQ_DUE_F64 + line;
    if (due > this.#controlF64[f64]) this.#controlF64[f64] = due;
  }

  /** Raises interrupt line `line` on every vCPU: whichever waits for the device sees it. Wakes halted ones. */
  interrupt(line: number): void {
    for (let v = 0; v < this.count; v++) {
      const irq = this.#base(v) + VC_IRQ;
      // Publishes the due time and whatever the device wrote. Pairs with the exchange in `Vcpu.takeInterrupts`.
      Atomics.or(this.#control, irq, 1 << line);
      Atomics.notify(this.#control, irq);
    }
  }

  /** System reset: nothing is pending any more. Every vCPU is outside; pairs with the exchange in `Vcpu.takeInterrupts`. */
  clearInterrupts(): void {
    for (let v = 0; v < this.count; v++) Atomics.store(this.#control, this.#base(v) + VC_IRQ, 0);
  }

  // ── Flushes ──────────────────────────────────────────────────────────────────────────────────────────────────────

  /**
   * Asks every vCPU to drop its translations: the requests to wait for. Set the request, *then* load the mode: pairs with
   * store mode, then load request in `Vcpu.enterGuest`. One that is OUTSIDE keeps the request.
   */
  requestFlush(): readonly number[] {
    const want: number[] = [];
    for (let v = 0; v < this.count; v++) {
      this.#schedule.point('flush-request', v);
      want.push(Atomics.add(this.#control, this.#base(v) + VC_FLUSH_REQ, 1) + 1);
    }
    return want;
  }

  /** Whether a vCPU in guest mode has yet to do what `requestFlush` asked. */
  owesFlush(want: readonly number[]): boolean {
    const control = this.#control;
    for (let v = 0; v < this.count; v++) {
      const base = this.#base(v);
      if (Atomics.load(control, base + VC_MODE) === MODE_OUTSIDE) continue;
      if (((Atomics.load(control, base + VC_FLUSH_ACK) - want[v]) | 0) < 0) return true;
    }
    return false;
  }
}
