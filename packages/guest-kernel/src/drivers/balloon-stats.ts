/** What the balloon's driver tells the host of its memory: the tags of Linux 6.12 (`update_balloon_stats`). */
import { BALLOON_STAT_BYTES, BALLOON_STAT_NR } from '@ebb/virtio/uapi';
import type { Arena } from '../arena.ts';
import { H_NR_FILE_PAGES } from '../layout.ts';
import { eventSum, type EventName } from '../mm/events.ts';
import { availablePages, Z_FREE, Z_MANAGED } from '../mm/zone.ts';

/** The entries of a statistics buffer, le16 tag and le64 value each. `zones` are the zones' first words. */
export function balloonStats(arena: Arena, zones: readonly number[]): Uint8Array {
  const bytes = new DataView(new ArrayBuffer(BALLOON_STAT_NR * BALLOON_STAT_BYTES));
  values(arena, zones).forEach((value, tag) => {
    bytes.setUint16(tag * BALLOON_STAT_BYTES, tag, true);
    bytes.setUint32(tag * BALLOON_STAT_BYTES + 2, value >>> 0, true);
    bytes.setUint32(tag * BALLOON_STAT_BYTES + 6, Math.floor(value / 0x1_0000_0000), true);
  });
  return new Uint8Array(bytes.buffer);
}

/**
 * Values by tag, memory in bytes. Swap and huge-page tags are 0: this kernel has neither. So is the one of major faults: no
 * process maps a file.
 */
function values(arena: Arena, zones: readonly number[]): number[] {
  const { w } = arena;
  const free = zones.reduce((sum, z) => sum + w[z + Z_FREE], 0);
  const total = zones.reduce((sum, z) => sum + w[z + Z_MANAGED], 0);
  const event = (name: EventName): number => eventSum(arena, name);
  return [
    0,
    0,
    0,
    event('pgfault'),
    free * 4096,
    total * 4096,
    availablePages(w, zones) * 4096,
    w[H_NR_FILE_PAGES] * 4096,
    0,
    0,
    event('oom_kill'),
    event('allocstall'),
    event('pgscan_kswapd') * 4096,
    event('pgscan_direct') * 4096,
    event('pgsteal_kswapd') * 4096,
    event('pgsteal_direct') * 4096,
  ];
}
