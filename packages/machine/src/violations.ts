/**
 * The violation log: a shared counter per kind and a ring of records, which any thread may append to. A record names
 * both ends: who touched what, who owned it, and which step released or took it.
 */
import {
  VIOLATION_BYTES,
  VIOLATION_COUNT,
  VIOLATION_KIND_BASE,
  VIOLATION_RECORDS,
  VIOLATION_RECORD_BASE,
  VIOLATION_RECORD_WORDS,
} from './layout.ts';
import { sharedI32 } from './shared-views.ts';

/** Kinds in log order; the index is the code in shared memory. */
export const VIOLATION_KINDS = [
  /** A host frame was touched by an actor while it was free. */
  'use-after-free',
  /** A vCPU used a translation whose frame has changed owner since (I4, I17). */
  'stale-tlb',
  /** An actor touched a frame that belongs to somebody else (I1). */
  'foreign-frame',
  /** A device touched bytes of a buffer it no longer holds (I16). */
  'device-lease',
  /** A page in a reporting request was handed out before its acknowledgement (I3). */
  'reported-reuse',
  /** A guest page moved between allocator states in a way that cannot happen (I19). */
  'guest-page-state',
  /** A page's content changed under its owner (I15). */
  'stamp',
  /** A sum of I9 does not hold. */
  'accounting',
  /** A dirty bit was lost (I18). */
  'lost-dirty',
] as const;

export type ViolationKind = (typeof VIOLATION_KINDS)[number];

/** Who touched: a vCPU, a device model, KVM, the VMM. */
export const ACTORS = ['vcpu', 'device', 'kvm', 'vmm'] as const;
export type Actor = (typeof ACTORS)[number];

export interface Violation {
  readonly kind: ViolationKind;
  readonly actor: Actor;
  readonly vm: number;
  readonly vcpu: number;
  readonly gfn: number;
  readonly hfn: number;
  /** Generation the actor held and the one found, or stamps for `stamp`. */
  readonly expected: number;
  readonly found: number;
  /** Owner code found in the ledger. */
  readonly owner: number;
  readonly stepTaken: number;
  readonly stepReleased: number;
}

export class ViolationLog {
  readonly #words: Int32Array;

  constructor(buffer: SharedArrayBuffer) {
    this.#words = sharedI32('violations', buffer);
  }

  static create(): SharedArrayBuffer {
    return new SharedArrayBuffer(VIOLATION_BYTES);
  }

  record(v: Violation): void {
    const words = this.#words;
    const kind = VIOLATION_KINDS.indexOf(v.kind);
    Atomics.add(words, VIOLATION_KIND_BASE + kind, 1);
    const slot = Atomics.add(words, VIOLATION_COUNT, 1);
    if (slot >= VIOLATION_RECORDS) return;
    const at = VIOLATION_RECORD_BASE + slot * VIOLATION_RECORD_WORDS;
    words[at + 1] = ACTORS.indexOf(v.actor);
    words[at + 2] = v.vm;
    words[at + 3] = v.vcpu;
    words[at + 4] = v.gfn;
    words[at + 5] = v.hfn;
    words[at + 6] = v.expected;
    words[at + 7] = v.found;
    words[at + 8] = v.owner;
    words[at + 9] = v.stepTaken;
    words[at + 10] = v.stepReleased;
    // Publishes the record; pairs with the load in `list`.
    Atomics.store(words, at, kind + 1);
  }

  get total(): number {
    return Atomics.load(this.#words, VIOLATION_COUNT);
  }

  count(kind: ViolationKind): number {
    return Atomics.load(this.#words, VIOLATION_KIND_BASE + VIOLATION_KINDS.indexOf(kind));
  }

  /** The first 64 records, oldest first. */
  list(): Violation[] {
    const words = this.#words;
    const out: Violation[] = [];
    for (let slot = 0; slot < Math.min(this.total, VIOLATION_RECORDS); slot++) {
      const at = VIOLATION_RECORD_BASE + slot * VIOLATION_RECORD_WORDS;
      const kind = Atomics.load(words, at);
      if (kind === 0) continue;
      out.push({
        kind: VIOLATION_KINDS[kind - 1],
        actor: ACTORS[words[at + 1]],
        vm: words[at + 2],
        vcpu: words[at + 3],
        gfn: words[at + 4],
        hfn: words[at + 5],
        expected: words[at + 6],
        found: words[at + 7],
        owner: words[at + 8],
        stepTaken: words[at + 9],
        stepReleased: words[at + 10],
      });
    }
    return out;
  }
}

/** One line a person can act on. `owner` codes are explained by `describeOwner` of the ledger. */
export function describeViolation(v: Violation, describeOwner: (owner: number) => string): string {
  const who = v.actor === 'vcpu' ? `vCPU ${v.vm}/${v.vcpu}` : `${v.actor} of VM ${v.vm}`;
  const where =
    v.hfn >= 0
      ? `host frame 0x${v.hfn.toString(16)} (gfn 0x${v.gfn.toString(16)})`
      : `guest page 0x${v.gfn.toString(16)}`;
  return (
    `${v.kind}: ${who} touched ${where}; expected ${v.expected}, found ${v.found}; ` +
    `owner now ${describeOwner(v.owner)}, taken at step ${v.stepTaken}, last released at step ${v.stepReleased}`
  );
}
