/** The device's side. */
export { C_WRITTEN, CHAIN_WORDS, ChainBatch } from './chain-batch.ts';
export * from './descriptor-chain.ts';
export * from './mmio-transport.ts';
export * from './queue-error.ts';
export * from './split-device-queue.ts';
export * from './virtio-device.ts';
