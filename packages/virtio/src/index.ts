/** virtio: wire formats, both sides of split queues, the virtio-mmio transport. Import a side: `@ebb/virtio/driver`. */
export * from './uapi/index.ts';
