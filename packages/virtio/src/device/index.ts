/** The device's side. */
export * from './descriptor-chain.ts';
export * from './mmio-transport.ts';
export * from './split-device-queue.ts';
export * from './virtio-device.ts';
