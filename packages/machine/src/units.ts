/** Sizes and times used by every package. Sizes are bytes, times are virtual nanoseconds unless a name says otherwise. */

import { err, ok, type Result } from './result.ts';

export const KiB = 1024;
export const MiB: number = 1024 * KiB;
export const GiB: number = 1024 * MiB;

/** The base page of guest and host: 4 KiB (x86-64). */
export const PAGE_SHIFT = 12;
export const PAGE_SIZE = 4096;
/** 32-bit words in a page. */
export const PAGE_WORDS = 1024;
/** 4 KiB pages in a 2 MiB large page, the order-9 block of the buddy allocators. */
export const HUGE_PAGES = 512;
export const HUGE_ORDER = 9;
/** 4 KiB pages in a 1 GiB page. */
export const GIGA_PAGES: number = 512 * 512;

export const NS_PER_US = 1_000;
export const NS_PER_MS = 1_000_000;
export const NS_PER_S = 1_000_000_000;

const SUFFIX: Record<string, number> = { '': 1, K: KiB, M: MiB, G: GiB, T: 1024 * GiB };

/** Parses `512M`, `2G`, `4096K`, `1.5G` or plain bytes. Fails with the offending text. */
export function parseSize(text: string): Result<number, string> {
  const match = /^(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?$/i.exec(text.trim());
  if (match === null) return err(`'${text}' is not a size; write for example 512M or 2G`);
  const bytes = Number(match[1]) * (SUFFIX[(match[2] ?? '').toUpperCase()] ?? 1);
  if (!Number.isInteger(bytes)) return err(`'${text}' is not a whole number of bytes`);
  return ok(bytes);
}

/** Formats bytes for people: `2 GiB`, `512 MiB`, `1.5 GiB`. */
export function formatBytes(bytes: number): string {
  for (const [unit, size] of [
    ['GiB', GiB],
    ['MiB', MiB],
    ['KiB', KiB],
  ] as const) {
    if (Math.abs(bytes) >= size) return `${Number((bytes / size).toFixed(2))} ${unit}`;
  }
  return `${bytes} B`;
}
