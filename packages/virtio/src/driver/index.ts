/** The driver's side. */
export * from './mmio-driver.ts';
export * from './split-driver-queue.ts';
