/**
 * What things cost in virtual time. The one table; results carry its hash. Entries are nanoseconds unless the name says
 * otherwise. Each names its source: measured figures are from published papers or from our own captures of Linux 6.12
 * under QEMU 7.2; *assumed* marks an engineering estimate that a user may replace.
 */
export interface CostTable {
  /** VM exit and re-entry without work. Source: KVM unit-tests `vmcall`, ~1,300 cycles ≈ 0.5 µs at 2.6 GHz. */
  readonly exitNs: number;
  /** EPT violation served with a ready frame, without zeroing. Source: EuroSys'25 HyperAlloc fig. 6 (touch cost), assumed split. */
  readonly faultNs: number;
  /** Zeroing one 4 KiB frame by the host. Source: ~10 GiB/s clear_page. */
  readonly hostZeroPageNs: number;
  /** Zeroing one 4 KiB page by the guest (init_on_alloc). Source: as above. */
  readonly guestZeroPageNs: number;
  /** Remote TLB flush per vCPU in guest mode (IPI and exit). Source: Amit, "Optimizing the TLB shootdown", ~2 µs. */
  readonly flushPerVcpuNs: number;
  /** Discarding one mapped leaf: zap and freeing the frame(s). Source: EuroSys'25, 4 KiB balloon 0.95 GiB/s. */
  readonly discardLeafNs: number;
  /** Virtqueue round trip: kick, host wake-up, completion interrupt. Source: vhost measurements, assumed. */
  readonly queueRoundTripNs: number;
  /** Disk request fixed cost (NVMe-class). Assumed. */
  readonly diskRequestNs: number;
  /** Disk transfer per 4 KiB page, 2 GB/s. Assumed. */
  readonly diskPageNs: number;
  /** One page-allocator operation in the guest. Source: LLFree paper, Linux buddy 94/90 ns. */
  readonly allocNs: number;
  /** Bytes of host memory per VM for the VMM process. Source: QEMU 7.2 RSS beyond guest RAM in our captures, 16 MiB. */
  readonly vmmBytesPerVm: number;
}

export const COST_TABLE: CostTable = {
  exitNs: 500,
  faultNs: 1_000,
  hostZeroPageNs: 400,
  guestZeroPageNs: 400,
  flushPerVcpuNs: 2_000,
  discardLeafNs: 3_600,
  queueRoundTripNs: 10_000,
  diskRequestNs: 80_000,
  diskPageNs: 2_000,
  allocNs: 90,
  vmmBytesPerVm: 16 * 1024 * 1024,
};

/** A short stable hash (FNV-1a, 32 bits, hex) of a table, carried by every result. */
export function costTableHash(table: CostTable): string {
  let h = 0x811c9dc5;
  for (const char of JSON.stringify(Object.entries(table).toSorted(([a], [b]) => (a < b ? -1 : 1)))) {
    h = Math.imul(h ^ char.charCodeAt(0), 0x01000193);
  }
  return (h >>> 0).toString(16).padStart(8, '0');
}
