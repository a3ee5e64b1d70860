/**
 * How far V8 inlines. Its budget for one function is 920 bytes of bytecode, less than the way of one page through allocator
 * or fault: calls in the middle cost what they call. Runs that last get more; a search, whose executions are short, is better
 * off with less to compile. For the process and workers spawned later; what is compiled already stays as it is. What a function
 * has swallowed counts where it is inlined in turn: docs/performance.md § Inlining.
 */
import { setFlagsFromString } from 'node:v8';

const BUDGETS = {
  /** `ebb run`, `compare`, `vm`, fidelity, benchmarks: a third less for an allocation, a fifth less for a fault. */
  long: { one: 1500, all: 5000 },
  /** V8's own. */
  short: { one: 460, all: 920 },
} as const;

/** Call before what is to be inlined is hot. */
export function inlineFor(runs: keyof typeof BUDGETS): void {
  const { one, all } = BUDGETS[runs];
  setFlagsFromString(`--max-inlined-bytecode-size=${one}`);
  setFlagsFromString(`--max-inlined-bytecode-size-cumulative=${all}`);
}
