/**
 * Litmus tests of the store-then-load pairs on which the protocols rest: each side stores, then loads what the other
 * stores; both missing the other's store is the outcome that must not be. Every execution is enumerated under a modelled
 * store buffer (total store order, as x86 has it): a plain store may stay in its thread's buffer past a later load, an
 * atomic one empties the buffer first.
 */

/** A step of one thread over shared variables; `atomic` is what the sources use. */
type Step =
  | { readonly op: 'store'; readonly to: string; readonly atomic: boolean }
  | { readonly op: 'load'; readonly from: string };

export interface Litmus {
  readonly name: string;
  /** Who the two sides are, and where their steps are in the sources. */
  readonly sides: readonly [string, string];
  readonly threads: readonly [readonly Step[], readonly Step[]];
  /** What it means if both loads miss. */
  readonly forbidden: string;
}

const pair = (
  name: string,
  sides: readonly [string, string],
  first: string,
  second: string,
  forbidden: string,
): Litmus => ({
  name,
  sides,
  threads: [
    [
      { op: 'store', to: first, atomic: true },
      { op: 'load', from: second },
    ],
    [
      { op: 'store', to: second, atomic: true },
      { op: 'load', from: first },
    ],
  ],
  forbidden,
});

export const LITMUS: readonly Litmus[] = [
  pair(
    'mode / request',
    ['Vcpu.enterGuest', 'Vm.#flushAll'],
    'mode',
    'request',
    'the host skips a vCPU that runs on without a flush (I17)',
  ),
  pair(
    'avail.idx / avail_event',
    ['SplitDriverQueue.publish', 'SplitDeviceQueue.enableKicks'],
    'avail.idx',
    'avail_event',
    'a buffer lies in the ring and nobody kicks (I24)',
  ),
  pair(
    'used.idx / used_event',
    ['SplitDeviceQueue.publish', 'SplitDriverQueue.enableInterrupts'],
    'used.idx',
    'used_event',
    'a buffer is returned and nobody is interrupted (I24)',
  ),
  pair(
    'work / asleep',
    ['Vcpu.exit', "the host's loop"],
    'mailbox',
    'asleep',
    'a vCPU waits for a host that sleeps (I24)',
  ),
];

export interface LitmusOutcome {
  /** Executions by the pair of values loaded, as `r0 r1`. */
  readonly outcomes: ReadonlyMap<string, number>;
  readonly executions: number;
  /** Executions in which both loads missed. */
  readonly both: number;
}

interface State {
  readonly at: readonly [number, number];
  readonly memory: ReadonlySet<string>;
  readonly buffers: readonly [readonly string[], readonly string[]];
  readonly loaded: readonly [number, number];
}

/** Enumerates every execution. `weaken`: the thread whose store is made plain, −1 for none. */
export function enumerate(litmus: Litmus, weaken: -1 | 0 | 1): LitmusOutcome {
  const outcomes = new Map<string, number>();
  let executions = 0;
  const visit = (s: State): void => {
    let moved = false;
    for (const t of [0, 1] as const) {
      const [oldest, ...rest] = s.buffers[t];
      if (oldest !== undefined) {
        moved = true;
        visit({ ...s, memory: new Set([...s.memory, oldest]), buffers: replaced(s.buffers, t, rest) });
      }
      const step = litmus.threads[t][s.at[t]];
      if (step === undefined) continue;
      const at = replaced(s.at, t, s.at[t] + 1);
      if (step.op === 'load') {
        moved = true;
        const seen = s.buffers[t].includes(step.from) || s.memory.has(step.from) ? 1 : 0;
        visit({ ...s, at, loaded: replaced(s.loaded, t, seen) });
      } else if (!step.atomic || weaken === t) {
        moved = true;
        visit({ ...s, at, buffers: replaced(s.buffers, t, [...s.buffers[t], step.to]) });
      } else if (s.buffers[t].length === 0) {
        moved = true;
        visit({ ...s, at, memory: new Set([...s.memory, step.to]) });
      }
    }
    if (moved) return;
    executions++;
    const key = s.loaded.join(' ');
    outcomes.set(key, (outcomes.get(key) ?? 0) + 1);
  };
  visit({ at: [0, 0], memory: new Set(), buffers: [[], []], loaded: [0, 0] });
  return { outcomes, executions, both: outcomes.get('0 0') ?? 0 };
}

function replaced<T>(pairOf: readonly [T, T], index: 0 | 1, value: T): readonly [T, T] {
  return index === 0 ? [value, pairOf[1]] : [pairOf[0], value];
}
