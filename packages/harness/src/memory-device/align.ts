/** Two sequences side by side, by their longest common subsequence. */

/** A row: equal on both sides, or present on one only. */
export interface Aligned {
  readonly ebb: string;
  readonly real: string;
}

/** Aligns two sequences; rows in which both sides are equal number the longest common subsequence. */
export function longestCommonSubsequence(ebb: readonly string[], real: readonly string[]): Aligned[] {
  const width = real.length + 1;
  const best = new Int32Array((ebb.length + 1) * width);
  for (let i = ebb.length - 1; i >= 0; i--)
    for (let j = real.length - 1; j >= 0; j--)
      best[i * width + j] =
        ebb[i] === real[j]
          ? best[(i + 1) * width + j + 1] + 1
          : Math.max(best[(i + 1) * width + j], best[i * width + j + 1]);
  const rows: Aligned[] = [];
  let i = 0;
  let j = 0;
  while (i < ebb.length || j < real.length) {
    if (i < ebb.length && j < real.length && ebb[i] === real[j])
      rows.push({ ebb: ebb[i++], real: real[j++] });
    else if (j >= real.length || (i < ebb.length && best[(i + 1) * width + j] >= best[i * width + j + 1]))
      rows.push({ ebb: ebb[i++], real: '' });
    else rows.push({ ebb: '', real: real[j++] });
  }
  return rows;
}
