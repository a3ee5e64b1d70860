/** A malformed ring: what is wrong and the offending value. */
export type QueueError =
  | { readonly kind: 'ring-not-in-ram'; readonly gpa: number }
  | { readonly kind: 'avail-index-jump'; readonly by: number }
  | { readonly kind: 'head-out-of-range'; readonly head: number }
  | { readonly kind: 'next-out-of-range'; readonly next: number }
  | { readonly kind: 'chain-too-long'; readonly limit: number }
  | { readonly kind: 'zero-length'; readonly gpa: number }
  | { readonly kind: 'too-many-bytes'; readonly bytes: number }
  | { readonly kind: 'readable-after-writable'; readonly index: number }
  | { readonly kind: 'indirect-not-negotiated' }
  | { readonly kind: 'indirect-with-next' }
  | { readonly kind: 'indirect-nested' }
  | { readonly kind: 'indirect-length'; readonly length: number }
  | { readonly kind: 'buffer-not-in-ram'; readonly gpa: number };
