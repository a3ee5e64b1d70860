/** Which figures make a memory device. A user's mistake is told in QEMU's words, where QEMU has some. */

/** QEMU's smallest block. */
const MIN_BLOCK_BYTES = 0x10_0000;

/** Why these figures make no memory device, in QEMU's words where it has some; empty when they do. */
export function judgeMemoryDevice(options: {
  readonly addr: number;
  readonly regionBytes: number;
  readonly blockBytes: number;
  readonly requestedBytes: number;
  readonly region: { readonly pageBytes: number };
}): string {
  const { addr, regionBytes, blockBytes, requestedBytes, region } = options;
  const hex = (n: number): string => `0x${n.toString(16)}`;
  if (blockBytes < MIN_BLOCK_BYTES) return `'block-size' property has to be at least ${hex(MIN_BLOCK_BYTES)}`;
  if (!Number.isInteger(Math.log2(blockBytes))) return "'block-size' property has to be a power of two";
  if (blockBytes < region.pageBytes)
    return `'block-size' property has to be at least the page size (${hex(region.pageBytes)})`;
  if (regionBytes % blockBytes !== 0)
    return `'memdev' property: the size of the memory backend has to be multiples of 'block-size' (${hex(blockBytes)})`;
  if (addr % blockBytes !== 0)
    return `'memaddr' property has to be multiples of 'block-size' (${hex(blockBytes)})`;
  return judgeRequested(options.regionBytes, blockBytes, requestedBytes);
}

/** Why a requested size is refused, in QEMU's words; empty when it is not. */
export function judgeRequested(regionBytes: number, blockBytes: number, bytes: number): string {
  if (bytes < 0 || bytes % blockBytes !== 0)
    return `'requested-size' has to be multiples of 'block-size' (0x${blockBytes.toString(16)})`;
  if (bytes > regionBytes)
    return `'requested-size' cannot exceed the memory backend size(0x${regionBytes.toString(16)})`;
  return '';
}
