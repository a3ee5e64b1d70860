/**
 * The one random source. Seeded, reproducible, injected: nothing in Ebb calls `Math.random`.
 * Algorithm: sfc32 (Doty-Humphrey, PractRand), 128 bits of state.
 */
export class Prng {
  #a: number;
  #b: number;
  #c: number;
  #d: number;

  constructor(seed: number) {
    this.#a = 0x9e3779b9 | 0;
    this.#b = 0x243f6a88 | 0;
    this.#c = Math.trunc(seed / 0x1_0000_0000) | 0;
    this.#d = seed | 0;
    for (let i = 0; i < 15; i++) this.nextU32();
  }

  /** The next unsigned 32-bit number. */
  nextU32(): number {
    const t = (((this.#a + this.#b) | 0) + this.#d) | 0;
    this.#d = (this.#d + 1) | 0;
    this.#a = this.#b ^ (this.#b >>> 9);
    this.#b = (this.#c + (this.#c << 3)) | 0;
    this.#c = (this.#c << 21) | (this.#c >>> 11);
    this.#c = (this.#c + t) | 0;
    return t >>> 0;
  }

  /** A whole number in `[0, bound)`; `bound` at most 2³². */
  below(bound: number): number {
    return Math.floor((this.nextU32() / 0x1_0000_0000) * bound);
  }

  /** A number in `[0, 1)` with 32 bits. */
  unit(): number {
    return this.nextU32() / 0x1_0000_0000;
  }
}

/** A well-mixed 32-bit hash of two ints; the same everywhere. Used for disk patterns and block placement. */
export function hash2(a: number, b: number): number {
  let h = Math.imul(a ^ 0x85ebca6b, 0xcc9e2d51) ^ Math.imul(b + 0x165667b1, 0x1b873593);
  h = Math.imul(h ^ (h >>> 15), 0x2c1b3c6d);
  h = Math.imul(h ^ (h >>> 12), 0x297a2d39);
  return (h ^ (h >>> 15)) >>> 0;
}
