/** Memory device (virtio-mem), device 24: features, configuration, requests and responses (virtio 1.2 § 5.15). */

/** `node_id` is the ACPI proximity domain of the region. */
export const VIRTIO_MEM_F_ACPI_PXM = 0;
/** Unplugged memory must not be accessed at all. */
export const VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE = 1;
/** Blocks keep their state over a suspend (virtio 1.4). */
export const VIRTIO_MEM_F_PERSISTENT_SUSPEND = 2;

/**
 * Ebb's own, in no specification (row H37): the guest may ask for more memory. A request of type `EBB_MEM_REQ_MORE` with a
 * number of blocks is answered ACK after `requested_size` has grown, or NACK.
 */
export const EBB_MEM_F_MORE = 23;
export const EBB_MEM_REQ_MORE = 0x8000;

/**
 * Ebb's own, proposed in 2017 and never specified (rows H44, H63): the guest trades plugged blocks for as many unplugged ones
 * in one step, so that its size never changes. A request of type `EBB_MEM_REQ_EXCHANGE`: `addr` and `nb_blocks` are what it
 * gives, the last four bytes the first block it takes, counted from the region's start (le32). ACK, BUSY or ERROR.
 */
export const EBB_MEM_F_EXCHANGE = 22;
export const EBB_MEM_REQ_EXCHANGE = 0x8001;
export const EBB_MEM_REQ_TO_OFFSET = 20;

/** Config space, 56 bytes, all read-only to the driver. */
export const MEM_CFG_BLOCK_SIZE = 0;
export const MEM_CFG_NODE_ID = 8;
export const MEM_CFG_ADDR = 16;
export const MEM_CFG_REGION_SIZE = 24;
export const MEM_CFG_USABLE_REGION_SIZE = 32;
export const MEM_CFG_PLUGGED_SIZE = 40;
export const MEM_CFG_REQUESTED_SIZE = 48;
export const MEM_CFG_BYTES = 56;

/** Request: `le16 type; le16 padding[3]; le64 addr; le16 nb_blocks; le16 padding[3]`. */
export const MEM_REQ_BYTES = 24;
export const VIRTIO_MEM_REQ_PLUG = 0;
export const VIRTIO_MEM_REQ_UNPLUG = 1;
export const VIRTIO_MEM_REQ_UNPLUG_ALL = 2;
export const VIRTIO_MEM_REQ_STATE = 3;

/** Response: `le16 type; le16 padding[3]; le16 state`. */
export const MEM_RESP_BYTES = 10;
export const MEM_RESP_STATE_OFFSET = 8;
export const VIRTIO_MEM_RESP_ACK = 0;
export const VIRTIO_MEM_RESP_NACK = 1;
export const VIRTIO_MEM_RESP_BUSY = 2;
export const VIRTIO_MEM_RESP_ERROR = 3;

export const VIRTIO_MEM_STATE_PLUGGED = 0;
export const VIRTIO_MEM_STATE_UNPLUGGED = 1;
export const VIRTIO_MEM_STATE_MIXED = 2;

/** The one queue: guest requests. */
export const MEM_QUEUE_REQUEST = 0;
