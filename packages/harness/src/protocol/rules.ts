/** What a trace is judged by: requirements of the specification (virtio 1.2), by section and title. */

export interface Rule {
  readonly section: string;
  readonly title: string;
  /** The requirement, shortened where the specification says it in several sentences. */
  readonly must: string;
}

export interface Breach extends Rule {
  readonly line: number;
  readonly who: 'driver' | 'device';
  readonly what: string;
}

export const STATUS: Rule = {
  section: '2.1.1',
  title: 'Driver Requirements: Device Status Field',
  must: 'The driver MUST NOT clear a device status bit.',
};
export const CONSUME: Rule = {
  section: '2.1.2',
  title: 'Device Requirements: Device Status Field',
  must: 'The device MUST NOT consume buffers or send any used buffer notifications to the driver before DRIVER_OK.',
};
export const FEATURES: Rule = {
  section: '2.2.1',
  title: 'Driver Requirements: Feature Bits',
  must: 'The driver MUST NOT accept a feature which the device did not offer.',
};
export const LATE_FEATURES: Rule = {
  section: '3.1.1',
  title: 'Driver Requirements: Device Initialization',
  must: 'The driver MUST NOT accept new feature bits after this step.',
};
export const EARLY_KICK: Rule = {
  section: '3.1.1',
  title: 'Driver Requirements: Device Initialization',
  must: 'The driver MUST NOT send any buffer available notifications to the device before setting DRIVER_OK.',
};
export const QUEUE_SIZE: Rule = {
  section: '2.7',
  title: 'Split Virtqueues',
  must: 'Queue Size value is always a power of 2; its maximum is 32768.',
};
export const CHAIN_LENGTH: Rule = {
  section: '2.7.5.3.1',
  title: 'Driver Requirements: Indirect Descriptors',
  must: 'A driver MUST NOT create a descriptor chain longer than the Queue Size of the device.',
};
export const CHAIN_BYTES: Rule = {
  section: '2.7.5.1',
  title: 'Driver Requirements: The Virtqueue Descriptor Table',
  must: 'Drivers MUST NOT add a descriptor chain longer than 2^32 bytes in total.',
};
export const INDIRECT: Rule = {
  section: '2.7.5.3.1',
  title: 'Driver Requirements: Indirect Descriptors',
  must: 'The driver MUST NOT set the VIRTQ_DESC_F_INDIRECT flag unless the VIRTIO_F_INDIRECT_DESC feature was negotiated.',
};
export const EXPOSED: Rule = {
  section: '3.2.1',
  title: 'Supplying Buffers to The Device',
  must: 'A driver MUST NOT alter virtqueue entries for exposed buffers.',
};
export const USED_ID: Rule = {
  section: '2.7.8',
  title: 'The Virtqueue Used Ring',
  must: 'Each entry refers to a descriptor chain that the driver made available and that was not returned since.',
};
export const USED_LENGTH: Rule = {
  section: '2.7.8.2',
  title: 'Device Requirements: The Virtqueue Used Ring',
  must: 'The device MUST write at least len bytes to descriptor, beginning at the first device-writable buffer.',
};
export const INFLATED: Rule = {
  section: '5.5.6.1',
  title: 'Driver Requirements: Device Operation (Traditional Memory Balloon)',
  must: 'The driver MUST NOT request deflation of pages in the balloon before the device has acknowledged the inflate request.',
};
export const TELL_HOST: Rule = {
  section: '5.5.6.1',
  title: 'Driver Requirements: Device Operation (Traditional Memory Balloon)',
  must: 'The driver MUST use the deflateq to inform the device of pages that it wants to use from the balloon.',
};
export const ACTUAL: Rule = {
  section: '5.5.6.1',
  title: 'Driver Requirements: Device Operation (Traditional Memory Balloon)',
  must: 'The driver MUST update actual after changing the number of pages in the balloon.',
};
export const ACTUAL_KEPT: Rule = {
  section: '2.5.2',
  title: 'Device Requirements: Device Configuration Space',
  must: 'The device MUST present the value last written to a field that the driver may write.',
};
export const MEM_ERROR: Rule = {
  section: '5.15.6.2',
  title: 'Device Requirements: Device Operation: VIRTIO_MEM_REQ_PLUG',
  must: 'The device MUST reject requests with VIRTIO_MEM_RESP_ERROR if any memory block in the requested range is already plugged.',
};
export const MEM_UNPLUG_ERROR: Rule = {
  section: '5.15.6.4',
  title: 'Device Requirements: Device Operation: VIRTIO_MEM_REQ_UNPLUG',
  must: 'The device MUST reject requests with VIRTIO_MEM_RESP_ERROR if any memory block in the requested range is already unplugged.',
};
export const MEM_RANGE: Rule = {
  section: '5.15.6.2',
  title: 'Device Requirements: Device Operation: VIRTIO_MEM_REQ_PLUG',
  must: 'The device MUST reject requests with VIRTIO_MEM_RESP_ERROR if addr is not aligned to the block_size, if nb_blocks is not greater than 0, or if any memory block is not within the usable device-managed region.',
};
export const MEM_RESPONSE: Rule = {
  section: '5.15.6',
  title: 'Device Operation (Memory Device)',
  must: 'The device answers each request with one response: the driver waits for it before the next request.',
};
export const MEM_SHRINK: Rule = {
  section: '5.15.4.2',
  title: 'Device Requirements: Device configuration layout (Memory Device)',
  must: 'The device MUST NOT shrink usable_region_size, except when processing an UNPLUG ALL request, or during a device or system reset.',
};
export const MEM_CONFIG: Rule = {
  section: '5.15.4.2',
  title: 'Device Requirements: Device configuration layout (Memory Device)',
  must: 'The device MUST set block_size to a power of two, and addr, region_size and usable_region_size to multiples of block_size.',
};
export const MEM_CONFIG_WRITE: Rule = {
  section: '5.15.4.1',
  title: 'Driver Requirements: Device configuration layout (Memory Device)',
  must: 'The driver MUST NOT write to device configuration fields.',
};

/** Hears of a breach. */
export type Report = (rule: Rule, who: Breach['who'], what: string) => void;
