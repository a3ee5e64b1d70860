/** Nanoseconds per operation of `body`, which makes `ops` of them. */
export function timed(ops: number, body: () => void): number {
  const began = performance.now();
  body();
  return ((performance.now() - began) * 1e6) / ops;
}

/** Operations of a slice. */
const SLICE = 5_000;

/**
 * Nanoseconds per operation of `body`, which makes those from `from` to before `to`; `ops` in slices, of which the median
 * counts: V8 compiles in the first, and a neighbour on the machine slows a few.
 */
export function timedInSlices(ops: number, body: (from: number, to: number) => void): number {
  const slices: number[] = [];
  for (let from = 0; from < ops; from += SLICE) slices.push(timed(SLICE, () => body(from, from + SLICE)));
  return median(slices);
}

export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  return (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2;
}
