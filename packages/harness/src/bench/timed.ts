/** Nanoseconds per operation of `body`, which makes `ops` of them. */
export function timed(ops: number, body: () => void): number {
  const began = performance.now();
  body();
  return ((performance.now() - began) * 1e6) / ops;
}

export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  return (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2;
}
