/** A plain bitmap over 32-bit words, one bit per page or block. Private to one thread unless its words are shared. */
export class Bitmap {
  readonly words: Int32Array;
  readonly length: number;

  /** `length` bits, all clear; `words` may be given to lay the bitmap over existing memory. */
  constructor(length: number, words?: Int32Array) {
    this.length = length;
    this.words = words ?? new Int32Array((length + 31) >>> 5);
  }

  has(index: number): boolean {
    return ((this.words[index >>> 5] >>> (index & 31)) & 1) !== 0;
  }

  /** Sets bit `index`; returns true if it was clear. */
  add(index: number): boolean {
    const old = this.words[index >>> 5];
    const bit = 1 << (index & 31);
    this.words[index >>> 5] = old | bit;
    return (old & bit) === 0;
  }

  /** Clears bit `index`; returns true if it was set. */
  delete(index: number): boolean {
    const old = this.words[index >>> 5];
    const bit = 1 << (index & 31);
    this.words[index >>> 5] = old & ~bit;
    return (old & bit) !== 0;
  }

  clear(): void {
    this.words.fill(0);
  }

  /** Number of set bits. */
  count(): number {
    let total = 0;
    for (const word of this.words) {
      let w = word - ((word >>> 1) & 0x55555555);
      w = (w & 0x33333333) + ((w >>> 2) & 0x33333333);
      total += Math.imul((w + (w >>> 4)) & 0x0f0f0f0f, 0x01010101) >>> 24;
    }
    return total;
  }
}
