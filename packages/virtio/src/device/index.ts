/** The device's side. */
export { ChainBatch } from './chain-batch.ts';
export * from './descriptor-chain.ts';
export * from './mmio-transport.ts';
export * from './queue-error.ts';
export * from './split-device-queue.ts';
export * from './virtio-device.ts';
