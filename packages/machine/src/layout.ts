/**
 * Word offsets of every structure this package shares between threads. Sums are asserted in `layout.test.ts`.
 *
 * A *word* is 32 bits. Fields written by different threads sit on different 64-byte lines.
 */

/** vCPU control block: 4 KiB per vCPU. */
export const VCPU_BLOCK_BYTES = 4096;
export const VCPU_BLOCK_WORDS = 1024;
/** Line 0, written by the vCPU. */
export const VC_MODE = 0;
export const VC_FLUSH_ACK = 1;
/** Virtual clock, float64 (index in a Float64Array over the block). */
export const VC_CLOCK_F64 = 1;
/** Line 1, written by the host. */
export const VC_FLUSH_REQ = 16;
/** Interrupt lines pending; the host sets bits (`or`), the vCPU takes them all (`exchange`). */
export const VC_IRQ = 17;
/** Frame of the EPT root; set before the vCPU first enters guest mode. */
export const VC_EPT_ROOT = 18;
/**
 * Line 3: the exit mailbox. `STATE` is written by both in turn; see `EXIT_*`. Line 2 stays empty: the vCPU reads line 1 when it
 * enters guest mode, a core fetches the line behind the one it reads, and that must not be the one the other side writes.
 */
export const VC_EXIT_STATE = 48;
export const VC_EXIT_REASON = 49;
export const VC_EXIT_SIZE = 50;
export const VC_EXIT_DATA = 51;
/** Address of the exit, float64. */
export const VC_EXIT_ADDR_F64 = 26;
/** Result code and data, written by the host. */
export const VC_EXIT_RESULT = 54;
export const VC_EXIT_RDATA = 55;
/** Virtual cost of the exit in nanoseconds, float64, written by the host. */
export const VC_EXIT_COST_F64 = 28;
/** Virtual time at which each interrupt line's newest completion is due: 32 float64, written by the host. */
export const VC_IRQ_DUE_F64 = 32;
/** Stall histogram: 64 words, written by the vCPU (log₂ buckets in quarter steps from 256 ns). */
export const VC_STALL_HIST = 128;
export const VC_STALL_BUCKETS = 64;
/** Stall sum and maximum, float64, written by the vCPU. */
export const VC_STALL_TOTAL_F64 = 96;
export const VC_STALL_MAX_F64 = 97;

/** vCPU modes. Entering guest mode: store the mode, *then* load the requests (a Dekker pair with the flusher). */
export const MODE_OUTSIDE = 0;
export const MODE_GUEST = 1;

/** Exit mailbox states. */
export const EXIT_IDLE = 0;
export const EXIT_REQUEST = 1;
export const EXIT_REQUEST_SLEEPING = 2;
export const EXIT_DONE = 3;

/** Run control: 4 KiB, one per run. */
export const RUN_CONTROL_BYTES = 4096;
/** Written by main. */
export const RC_STOP = 0;
/** Doorbell of the host worker: anyone adds, the host waits on it. */
export const RC_DOORBELL = 16;
/** 1 while the host sleeps on the doorbell; written by the host. */
export const RC_HOST_ASLEEP = 32;
/** Sequence number of the window that workers may run; written by the host. */
export const RC_WINDOW = 33;
/** End of the window in virtual nanoseconds, float64; written by the host before `RC_WINDOW`. */
export const RC_WINDOW_UNTIL_F64 = 24;
/** Number of VMs that have been switched on; written by the host. */
export const RC_VMS_ON = 34;
/** Per worker, one 64-byte line from here: `done` (window sequence), `failed`, then `nextDue` as float64. */
export const RC_WORKER = 128;
export const RC_WORKER_STRIDE = 16;
export const RC_WORKER_DONE = 0;
export const RC_WORKER_FAILED = 1;
export const RC_WORKER_NEXT_DUE_F64 = 1;
export const RC_MAX_WORKERS = 32;

/** Violation log: a header and a ring of records. */
export const VIOLATION_COUNT = 0;
export const VIOLATION_KIND_BASE = 16;
export const VIOLATION_RECORDS = 64;
export const VIOLATION_RECORD_BASE = 64;
export const VIOLATION_RECORD_WORDS = 16;
export const VIOLATION_BYTES: number =
  (VIOLATION_RECORD_BASE + VIOLATION_RECORDS * VIOLATION_RECORD_WORDS) * 4;
