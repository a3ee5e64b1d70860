/** Wire formats: what both sides agree on. */
export * from './balloon.ts';
export * from './block.ts';
export * from './mem.ts';
export * from './mmio.ts';
export * from './virtio.ts';
