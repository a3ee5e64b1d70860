/** Nanoseconds per operation of `body`, which makes `ops` of them. */
export function timed(ops: number, body: () => void): number {
  const began = performance.now();
  body();
  return ((performance.now() - began) * 1e6) / ops;
}
