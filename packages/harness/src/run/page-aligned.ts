/**
 * Shared memory that begins on a page. JavaScript does not say where a `SharedArrayBuffer` begins, and V8's begin anywhere in
 * a cache line; then words that the layout keeps on lines of their own share one, and a line that one thread writes and
 * another polls is two. WebAssembly's memories begin on a page; nothing else of WebAssembly is used. Each reserves 8 GiB of
 * address space, of which only its own pages ever get memory.
 */
const WASM_PAGE = 65_536;

/** What of WebAssembly is used: TypeScript knows it with a browser's library only. */
declare const WebAssembly: {
  readonly Memory: new (limits: {
    readonly initial: number;
    readonly maximum: number;
    readonly shared: boolean;
  }) => { readonly buffer: ArrayBufferLike };
};

/**
 * At least `bytes` bytes, zeroed. Where WebAssembly has no memory to give (the address space is limited), an ordinary buffer,
 * which is merely slower. Throws a `RangeError` where there is none of that either.
 */
export function pageAligned(bytes: number): SharedArrayBuffer {
  const pages = Math.ceil(bytes / WASM_PAGE);
  try {
    const { buffer } = new WebAssembly.Memory({ initial: pages, maximum: pages, shared: true });
    if (buffer instanceof SharedArrayBuffer) return buffer;
  } catch {
    // An ordinary one, then.
  }
  return new SharedArrayBuffer(bytes);
}
