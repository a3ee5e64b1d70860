/** Block device, device 2: requests and configuration (virtio 1.2 § 5.2). */

/** Accept FLUSH requests. */
export const VIRTIO_BLK_F_FLUSH = 9;

export const VIRTIO_BLK_T_IN = 0;
export const VIRTIO_BLK_T_OUT = 1;
export const VIRTIO_BLK_T_FLUSH = 4;

export const VIRTIO_BLK_S_OK = 0;
export const VIRTIO_BLK_S_IOERR = 1;
export const VIRTIO_BLK_S_UNSUPP = 2;

export const SECTOR_BYTES = 512;
export const SECTORS_PER_PAGE = 8;
/** Request header: `le32 type; le32 reserved; le64 sector`. */
export const BLK_HEADER_BYTES = 16;
/** Config: `le64 capacity` in sectors. */
export const BLK_CFG_CAPACITY = 0;
