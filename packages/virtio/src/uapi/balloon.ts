/** Traditional memory balloon, device 5: features, configuration, statistics, hinting (virtio 1.2 § 5.5). */

export const VIRTIO_BALLOON_F_MUST_TELL_HOST = 0;
export const VIRTIO_BALLOON_F_STATS_VQ = 1;
export const VIRTIO_BALLOON_F_DEFLATE_ON_OOM = 2;
export const VIRTIO_BALLOON_F_FREE_PAGE_HINT = 3;
export const VIRTIO_BALLOON_F_PAGE_POISON = 4;
/** `VIRTIO_BALLOON_F_PAGE_REPORTING` in the specification, `_REPORTING` in Linux. */
export const VIRTIO_BALLOON_F_REPORTING = 5;

/** Config space, four le32. */
export const BALLOON_CFG_NUM_PAGES = 0;
export const BALLOON_CFG_ACTUAL = 4;
export const BALLOON_CFG_FREE_PAGE_HINT_CMD_ID = 8;
export const BALLOON_CFG_POISON_VAL = 12;
export const BALLOON_CFG_BYTES = 16;

/** PFNs on the queues are 4 KiB units whatever the page size of guest or host. */
export const VIRTIO_BALLOON_PFN_SHIFT = 12;
/** PFNs in one buffer of Linux's driver. */
export const VIRTIO_BALLOON_ARRAY_PFNS_MAX = 256;

/** Statistics tags; each entry is `{le16 tag; le64 val}` packed, 10 bytes. Index = tag. */
export const BALLOON_STAT_NAMES = [
  'stat-swap-in',
  'stat-swap-out',
  'stat-major-faults',
  'stat-minor-faults',
  'stat-free-memory',
  'stat-total-memory',
  'stat-available-memory',
  'stat-disk-caches',
  'stat-htlb-pgalloc',
  'stat-htlb-pgfail',
  'stat-oom-kill',
  'stat-alloc-stall',
  'stat-async-scan',
  'stat-direct-scan',
  'stat-async-reclaim',
  'stat-direct-reclaim',
] as const;
export type BalloonStatName = (typeof BALLOON_STAT_NAMES)[number];
export const BALLOON_STAT_BYTES = 10;
/** Tags that Linux 6.12 sends. */
export const BALLOON_STAT_NR = 16;

/** Free-page-hint command ids; 2 and up name a round. */
export const FREE_PAGE_HINT_STOP = 0;
export const FREE_PAGE_HINT_DONE = 1;
/** First id QEMU uses. */
export const FREE_PAGE_HINT_FIRST_ID = 0x80000000;
