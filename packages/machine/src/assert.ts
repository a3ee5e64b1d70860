/**
 * Our own mistakes crash; guest mistakes are `Result` values (see `result.ts`).
 * Assertions stay on in every build.
 */

/** Throws when `condition` is false. For invariants only Ebb itself can break. */
export function assert(condition: boolean, message: string): asserts condition {
  if (!condition) throw new Error(`assertion failed: ${message}`);
}
