/**
 * Reads descriptors: copies each once, checks the copy, and never reads the ring again for it (virtio 1.2 § 2.7.5). The guest
 * may rewrite them meanwhile; what it made of them is then not what the device acts on.
 *
 * Three readers with one meaning. `readCommon` takes buffers of the common form by the batch, in one loop over words that calls
 * nothing, and stops before the first that is not: one that lies elsewhere is looked up between two rounds of the loop, and
 * copied anew. `readSingles` takes those of one descriptor, wherever they lie; `read` takes any, and says what is wrong with
 * one. The first two need several windows at once: where one ends the others (`section` moves), they take none.
 */
import { PAGE_SIZE, pageOffset, type DeviceMemory } from '@ebb/machine';
import * as virtio from '../uapi/virtio.ts';
import type { RingAddresses } from '../uapi/virtio.ts';
import * as chainBatch from './chain-batch.ts';
import type { ChainBatch } from './chain-batch.ts';
import type { DescriptorChain } from './descriptor-chain.ts';
import type { QueueError } from './queue-error.ts';

// Local copies: docs/performance.md § Constants.
const {
  AVAIL_RING,
  DESC_BYTES,
  MAX_CHAIN_BYTES,
  MAX_QUEUE_SIZE,
  VIRTQ_DESC_F_INDIRECT,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
} = virtio;
const { C_END, C_HEAD, C_WRITTEN, CHAIN_WORDS } = chainBatch;
const PAGE: number = PAGE_SIZE;
const IN_PAGE: number = PAGE_SIZE - 1;

export class ChainReader {
  readonly #size: number;
  readonly #rings: RingAddresses;
  readonly #memory: DeviceMemory;
  readonly #indirect: boolean;
  /** Whether table and available ring each lie in one page, as `readCommon` needs them. */
  readonly #paged: boolean;
  /** The one descriptor that no window of the guest's memory shows as words. */
  readonly #descriptor: Int32Array = new Int32Array(DESC_BYTES / 4);

  /** `size` entries; `indirect`: INDIRECT_DESC was negotiated. */
  constructor(size: number, rings: RingAddresses, memory: DeviceMemory, indirect: boolean) {
    this.#size = size;
    this.#rings = rings;
    this.#memory = memory;
    this.#indirect = indirect;
    this.#paged =
      pageOffset(rings.desc) + size * DESC_BYTES <= PAGE_SIZE &&
      pageOffset(rings.driver) + AVAIL_RING + 2 * size <= PAGE_SIZE;
  }

  /**
   * Copies up to `max` buffers whose heads stand in the available ring from `idx` on into `batch`, from its beginning.
   * Returns how many: it stops before the first that is malformed or not of the common form (see `ChainBatch`).
   */
  readCommon(batch: ChainBatch, idx: number, max: number): number {
    batch.count = 0;
    if (!this.#paged || max === 0) return 0;
    const memory = this.#memory;
    const size = this.#size | 0;
    const mask = (size - 1) | 0;
    if (!memory.window(this.#rings.driver, AVAIL_RING + 2 * size, false)) return 0;
    const { u16, section } = memory;
    const ring = (memory.at + AVAIL_RING) >> 1;
    if (!memory.window(this.#rings.desc, size * DESC_BYTES, false) || memory.section !== section) return 0;
    const { i32 } = memory;
    const desc = memory.at >> 2;
    const toTable = this.#indirect ? VIRTQ_DESC_F_INDIRECT : 0;
    const { chains, segments } = batch;
    const words = segments.length | 0;
    const from = idx | 0;
    const n = max | 0;
    let taken = 0;
    chains[0] = touchTable(u16, i32, ring, desc, from, n, mask);
    // What was looked up: the page of the last table, where that lies, and the memory around two segments.
    let page = -1;
    let pageAt = 0;
    let low = 0;
    let high = 0;
    let low2 = 0;
    let high2 = 0;
    let looked = 0;
    let tries = 0;
    // Where what ended the loop lies, if it lies elsewhere: −1 if it does not.
    let missed: number;
    let isTable: boolean;
    do {
      missed = -1;
      isTable = false;
      // Touched before the loop: docs/performance.md § Loops.
      void i32[desc + ((u16[ring + ((from + taken) & mask)] & mask) << 2)];
      // Few values live through the loops, each one more costs a store in every round: docs/performance.md § Loops.
      let s = taken === 0 ? 0 : chains[(taken - 1) * CHAIN_WORDS + C_END] << 1;
      outer: for (; taken < n; taken++) {
        const head = u16[ring + ((from + taken) & mask)];
        if (head >= size) break;
        chains[(taken * CHAIN_WORDS + C_HEAD) | 0] = head;
        let d = (desc + (head << 2)) | 0;
        let word = i32[d + 3];
        let table = desc;
        let limit = size;
        // Descriptors that may come: a loop is a chain that is too long.
        let most = (s + (size << 1)) | 0;
        if ((word & toTable) !== 0) {
          const gpa = i32[d];
          const length = i32[d + 2];
          // A table within a page below 2 GiB, aligned to its descriptors; one of them at least.
          if (
            ((word & VIRTQ_DESC_F_NEXT) | i32[d + 1] | ((gpa | length) & 15)) !== 0 ||
            length <= 0 ||
            length > PAGE - (gpa & IN_PAGE)
          )
            break;
          if ((gpa & ~IN_PAGE) !== page) {
            missed = gpa & ~IN_PAGE;
            isTable = true;
            break;
          }
          limit = length >> 4;
          if (limit < size) most = (s + (limit << 1)) | 0;
          table = (pageAt + ((gpa & IN_PAGE) >> 2)) | 0;
          d = table;
          word = i32[d + 3];
        }
        const end = most < words ? most : words;
        let written = 0;
        let bytes = 0;
        if (s === end) break;
        for (;;) {
          const gpa = i32[d];
          const length = i32[d + 2];
          // Not more than before: a length of 0, a negative one, or 2 GiB together.
          const total = (bytes + length) | 0;
          if ((word & VIRTQ_DESC_F_INDIRECT) !== 0 || i32[d + 1] !== 0 || total <= bytes) break outer;
          if ((gpa < low || length > ((high - gpa) | 0)) && (gpa < low2 || length > ((high2 - gpa) | 0))) {
            missed = gpa;
            break outer;
          }
          bytes = total;
          segments[s] = gpa;
          if ((word & VIRTQ_DESC_F_WRITE) !== 0) {
            written = (written + length) | 0;
            segments[(s + 1) | 0] = -length;
          } else if (written === 0) segments[(s + 1) | 0] = length;
          // Readable after writable.
          else break outer;
          s = (s + 2) | 0;
          if ((word & VIRTQ_DESC_F_NEXT) === 0) break;
          const next = word >>> 16;
          if (next >= limit || s === end) break outer;
          d = (table + (next << 2)) | 0;
          word = i32[d + 3];
        }
        const c = (taken * CHAIN_WORDS) | 0;
        chains[(c + C_END) | 0] = s >> 1;
        chains[(c + C_WRITTEN) | 0] = written;
      }
      // Not ended by what lies elsewhere, or by what lies above 2 GiB, which is not the common form.
      if (missed < 0) break;
      // Of one buffer the table and two segments; a guest that rewrites it meanwhile gets no more.
      tries = taken > looked ? 1 : tries + 1;
      looked = taken;
      if (isTable) {
        if (!memory.window(missed, PAGE, false) || memory.section !== section || memory.i32 !== i32) break;
        page = missed | 0;
        pageAt = (memory.at >> 2) | 0;
      } else {
        if (!memory.extent(missed)) break;
        low2 = low;
        high2 = high;
        low = memory.from | 0;
        high = Math.min(memory.to, 0x7fff_ffff) | 0;
      }
    } while (tries <= 3);
    batch.count = taken;
    return taken;
  }

  /**
   * Copies up to `max` buffers of one descriptor each: heads, addresses, lengths (negative when writable). Stops before the
   * first that is not. Indices, flags and lengths are checked here, addresses where the buffer is touched.
   */
  readSingles(heads: Int32Array, gpas: Float64Array, lengths: Int32Array, idx: number, max: number): number {
    if (!this.#paged || max === 0) return 0;
    const memory = this.#memory;
    const size = this.#size | 0;
    const mask = (size - 1) | 0;
    if (!memory.window(this.#rings.driver, AVAIL_RING + 2 * size, false)) return 0;
    const { u16, section } = memory;
    const ring = (memory.at + AVAIL_RING) >> 1;
    if (!memory.window(this.#rings.desc, size * DESC_BYTES, false) || memory.section !== section) return 0;
    const { i32 } = memory;
    const desc = memory.at >> 2;
    const from = idx | 0;
    const n = max | 0;
    // Touched before the loop: docs/performance.md § Loops.
    gpas[0] = 0;
    lengths[0] = 0;
    heads[0] = touchTable(u16, i32, ring, desc, from, n, mask);
    let taken = 0;
    for (; taken < n; taken++) {
      const head = u16[ring + ((from + taken) & mask)];
      if (head >= size) break;
      const d = (desc + (head << 2)) | 0;
      const length = i32[d + 2];
      const word = i32[d + 3];
      if ((word & (VIRTQ_DESC_F_NEXT | VIRTQ_DESC_F_INDIRECT)) !== 0 || length <= 0) break;
      const low = i32[d];
      const high = i32[d + 1];
      heads[taken] = head;
      // Addresses below 2 GiB, nearly all of them, need no arithmetic on doubles.
      gpas[taken] = high === 0 && low >= 0 ? low : (high >>> 0) * 0x1_0000_0000 + (low >>> 0);
      lengths[taken] = (word & VIRTQ_DESC_F_WRITE) !== 0 ? -length : length;
    }
    return taken;
  }

  /**
   * Copies the chain that starts at `head` into `chain`: the descriptors in the ring's table, then those of an indirect
   * table, with which a chain may end (§ 2.7.5.3.2). What is wrong with it, if anything.
   */
  read(chain: DescriptorChain, head: number): QueueError | null {
    const size = this.#size;
    const descriptor = this.#descriptor;
    let table = this.#rings.desc;
    let limit = size;
    // Descriptors that may still come: a loop is a chain that is too long.
    let left = size;
    let nested = false;
    let index = head;
    chain.begin(head);
    for (;;) {
      if (left === 0) return { kind: 'chain-too-long', limit: Math.min(limit, size) };
      left--;
      const at = table + index * DESC_BYTES;
      if (!this.#copyDescriptor(at)) return { kind: 'ring-not-in-ram', gpa: at };
      const gpa = (descriptor[1] >>> 0) * 0x1_0000_0000 + (descriptor[0] >>> 0);
      const length = descriptor[2] >>> 0;
      const word = descriptor[3];
      if ((word & VIRTQ_DESC_F_INDIRECT) !== 0) {
        const bad = this.#badIndirect(nested, word, length);
        if (bad !== null) return bad;
        nested = true;
        table = gpa;
        limit = length / DESC_BYTES;
        left = Math.min(limit, size - chain.segments);
        index = 0;
        continue;
      }
      const writable = (word & VIRTQ_DESC_F_WRITE) !== 0;
      const bad = this.#badSegment(chain, gpa, length, writable, index);
      if (bad !== null) return bad;
      chain.append(gpa, length, writable);
      if ((word & VIRTQ_DESC_F_NEXT) === 0) return null;
      index = word >>> 16;
      if (index >= limit) return { kind: 'next-out-of-range', next: index };
    }
  }

  /** Copies the descriptor at `at` into `#descriptor`, wherever it lies: an indirect table has no alignment. False: not RAM. */
  #copyDescriptor(at: number): boolean {
    const memory = this.#memory;
    const descriptor = this.#descriptor;
    if (at % 4 === 0 && pageOffset(at) <= PAGE_SIZE - DESC_BYTES) {
      if (!memory.window(at, DESC_BYTES, false)) return false;
      const word = memory.at >> 2;
      for (let i = 0; i < DESC_BYTES / 4; i++) descriptor[i] = memory.i32[word + i];
      return true;
    }
    const bytes = new Uint8Array(descriptor.buffer);
    for (let done = 0; done < DESC_BYTES; ) {
      const n = Math.min(DESC_BYTES - done, PAGE_SIZE - pageOffset(at + done));
      if (!memory.window(at + done, n, false)) return false;
      for (let i = 0; i < n; i++) bytes[done + i] = memory.u8[memory.at + i];
      done += n;
    }
    return true;
  }

  /** What is wrong with an indirect descriptor, if anything (§ 2.7.5.3). */
  #badIndirect(nested: boolean, flags: number, length: number): QueueError | null {
    if (!this.#indirect) return { kind: 'indirect-not-negotiated' };
    if (nested) return { kind: 'indirect-nested' };
    if ((flags & VIRTQ_DESC_F_NEXT) !== 0) return { kind: 'indirect-with-next' };
    if (length === 0 || (length & (DESC_BYTES - 1)) !== 0 || length / DESC_BYTES > MAX_QUEUE_SIZE)
      return { kind: 'indirect-length', length };
    return null;
  }

  /** What is wrong with the next segment of `chain`, descriptor `index` of its table, if anything. */
  #badSegment(
    chain: DescriptorChain,
    gpa: number,
    length: number,
    writable: boolean,
    index: number,
  ): QueueError | null {
    if (length === 0) return { kind: 'zero-length', gpa };
    if (!writable && chain.writableSegments > 0) return { kind: 'readable-after-writable', index };
    if (chain.totalBytes + length > MAX_CHAIN_BYTES)
      return { kind: 'too-many-bytes', bytes: chain.totalBytes + length };
    if (!this.#inRam(gpa, length, writable)) return { kind: 'buffer-not-in-ram', gpa };
    return null;
  }

  /**
   * Whether a segment is in RAM: its first and last byte suffice to refuse wild addresses, and each page is checked again when
   * it is touched. Only looked at: a buffer that is given back or hinted may never have been touched, and is not to be.
   */
  #inRam(gpa: number, length: number, writable: boolean): boolean {
    const memory = this.#memory;
    if (pageOffset(gpa) + length <= PAGE_SIZE) return memory.contains(gpa, length, writable);
    return memory.contains(gpa, 1, writable) && memory.contains(gpa + length - 1, 1, writable);
  }
}

/**
 * Reads a word of every fourth of the `n` descriptors that the available ring names from `from` on, one of each line if they
 * lie side by side. The driver's core has just written them: asked for by a loop that does nothing else, the lines come
 * together (docs/performance.md § Lines). What it returns means nothing, but is to be stored, lest V8 leave the reads out.
 */
function touchTable(
  u16: Uint16Array,
  i32: Int32Array,
  ring: number,
  desc: number,
  from: number,
  n: number,
  mask: number,
): number {
  let all = 0;
  for (let i = 0; i < n; i = (i + 4) | 0) all |= i32[desc + ((u16[ring + ((from + i) & mask)] & mask) << 2)];
  return all;
}
