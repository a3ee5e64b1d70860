/**
 * Buffers popped together: what of them was copied and checked, as plain words. The form in which the queue hands out many
 * at once, and in which a single one is read before it becomes a `DescriptorChain`.
 *
 * Only buffers of the common form stand here: every segment below 2 GiB, less than 2 GiB together, in memory of at most two
 * extents (`DeviceMemory.extent`). What is longer, higher, elsewhere or malformed is left to `SplitDeviceQueue.pop`.
 */
import { assert } from '@ebb/machine';

/** Words of `chains` per buffer: head, end of its segments, bytes written. */
export const CHAIN_WORDS = 3;
export const C_HEAD = 0;
export const C_END = 1;
/** At first all that the device may write; a device that writes less lowers it before `pushChains`. */
export const C_WRITTEN = 2;

/** Words of `segments` per segment: guest-physical address, length in bytes (negative if the device may write). */
export const SEGMENT_WORDS = 2;

export class ChainBatch {
  /** Buffers this has room for. */
  readonly room: number;
  readonly chains: Int32Array;
  /** The segments of all buffers, one after the other: buffer `i` has those from the end of `i − 1` to its own. */
  readonly segments: Int32Array;
  count = 0;

  /** Room for `room` buffers, and `segments` segments (as many as a queue has entries, at least). */
  constructor(room: number, segments: number) {
    assert(room > 0 && segments > 0, 'a batch has room');
    this.room = room;
    this.chains = new Int32Array(room * CHAIN_WORDS);
    this.segments = new Int32Array(segments * SEGMENT_WORDS);
  }

  /** The descriptor that buffer `i` begins with; what the driver gets back. */
  head(i: number): number {
    return this.chains[i * CHAIN_WORDS + C_HEAD];
  }
  /** First segment of buffer `i`. */
  start(i: number): number {
    return i === 0 ? 0 : this.end(i - 1);
  }
  /** One behind the last segment of buffer `i`. */
  end(i: number): number {
    return this.chains[i * CHAIN_WORDS + C_END];
  }
  /** Bytes of buffer `i` that `pushChains` will say are written: at first all that may be. */
  written(i: number): number {
    return this.chains[i * CHAIN_WORDS + C_WRITTEN];
  }
  /** Guest-physical address of segment `j`. */
  gpa(j: number): number {
    return this.segments[j * SEGMENT_WORDS];
  }
  /** Bytes of segment `j`, negative if the device may write them; what it may read comes first. */
  length(j: number): number {
    return this.segments[j * SEGMENT_WORDS + 1];
  }
}
