/**
 * A range of guest-physical addresses whose owner decides, page by page, what an access meets: memory that is unplugged
 * is the case in point (`devices/unplugged-memory.ts`).
 */

/**
 * `memory`: as any RAM. `zeros`: a shared page of zeros, read-only, no frame is taken. `scribbled`: RAM that is filled
 * with noise when it is taken. `nothing`: as if no slot were there.
 */
export type Verdict = 'memory' | 'zeros' | 'scribbled' | 'nothing';

export interface RegionGate {
  readonly baseGfn: number;
  readonly nrPages: number;
  /** Pages that share one verdict: a leaf that covers more would let an access past. */
  readonly unitPages: number;
  /** `touches` false: somebody only looks where memory is; that is not counted. */
  verdict(gfn: number, write: boolean, touches: boolean): Verdict;
}

/** The gate that `gfn` lies behind, if any. */
export function gateOf(gates: readonly RegionGate[], gfn: number): RegionGate | undefined {
  for (let i = 0; i < gates.length; i++) {
    const gate = gates[i];
    if (gfn >= gate.baseGfn && gfn < gate.baseGfn + gate.nrPages) return gate;
  }
  return undefined;
}
