/**
 * A capture folder — `trace.txt[.gz]`, `start.*`, `end.*`, `dmesg.txt` — to a `Trace`. Without the states the guest
 * starts freshly booted. Node only: reads host files.
 */
import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs';
import { basename, dirname, join, resolve } from 'node:path';
import { gunzipSync } from 'node:zlib';
import { MiB, PAGE_SIZE } from '@ebb/machine';
import {
  START_ABSENT,
  START_FILE,
  START_FREE,
  START_MOVABLE,
  START_PCP,
  START_RESERVED,
  START_UNMOVABLE,
} from '@ebb/guest-kernel';
import { importTraceText, type ImportedEvents } from './import.ts';
import { VGA_HOLE_END, VGA_HOLE_START } from './vga-hole.ts';
import { traceHash, UserError, type Trace, type TraceEnd, type TraceStart } from './trace.ts';

/** Bits of /proc/kpageflags (include/uapi/linux/kernel-page-flags.h); low and high word of each 64-bit entry. */
const KPF_LRU = 1 << 5;
const KPF_SLAB = 1 << 7;
const KPF_BUDDY = 1 << 10;
const KPF_ANON = 1 << 12;
const KPF_SWAPBACKED = 1 << 14;
const KPF_NOPAGE = 1 << 20;
const KPF_PGTABLE = 1 << 26;
/** KPF_RESERVED is bit 32. */
const KPF_RESERVED_HIGH = 1;

/** Bit 21 (KSM) is set on every anonymous page of the captures and means nothing. */
const KPF_USED = ~(1 << 21);

/** Guests come in steps of 64 MiB. */
const ROUND_PAGES: number = (64 * MiB) / PAGE_SIZE;

function readMaybeGz(path: string): Buffer {
  try {
    const bytes = readFileSync(path);
    return path.endsWith('.gz') ? gunzipSync(bytes) : bytes;
  } catch (error) {
    throw new UserError(`${path}: cannot be read: ${(error as Error).message.split('\n')[0]}`);
  }
}

function findFile(folder: string, name: string): string | undefined {
  for (const candidate of [name, `${name}.gz`])
    if (existsSync(join(folder, candidate))) return join(folder, candidate);
  return undefined;
}

/** What a folder holds, for a message; nothing if it cannot be read. */
function foundIn(folder: string): string {
  try {
    return ` (found: ${readdirSync(folder).slice(0, 5).join(', ')})`;
  } catch (error) {
    return `: ${(error as Error).message.split('\n')[0]}`;
  }
}

/** Whoever writes a trace ends its last line; one that is cut off may look whole. */
function mustEnd(text: Uint8Array, file: string): void {
  if (text.length === 0 || text.at(-1) === 10) return;
  let lines = 1;
  for (const byte of text) if (byte === 10) lines++;
  const line = Buffer.from(text.subarray(text.lastIndexOf(10) + 1)).toString('latin1');
  throw new UserError(
    `${file}: line ${lines}: does not end; is the file truncated?: '${line.length > 120 ? `${line.slice(0, 120)}…` : line}'`,
  );
}

/** Reads a capture from a folder or from the trace file inside one (or alone). */
export function readCapture(path: string): Trace {
  if (!existsSync(path))
    throw new UserError(`${path}: no such file or folder; give a tracefs text or a capture folder`);
  const isFolder = statSync(path).isDirectory();
  const folder = isFolder ? path : dirname(path);
  const file = isFolder ? (findFile(path, 'trace.txt') ?? findFile(path, 'trace')) : path;
  if (file === undefined) throw new UserError(`${path}: has no trace.txt or trace.txt.gz${foundIn(path)}`);
  const text = readMaybeGz(file);
  mustEnd(text, file);
  const imported = importTraceText(text, file);
  const base = basename(resolve(isFolder ? path : file)).replace(/(\.txt)?(\.gz)?$/, '');
  const name = isFolder ? base : base === 'trace' ? basename(resolve(folder)) : base;
  const flags = imported.windowed ? findFile(folder, 'start.kpageflags') : undefined;
  const start = flags === undefined ? undefined : readStart(folder, flags, imported);
  // Pages beyond the start state (hot-plugged later) have no place of their own; events on them are counted as unknown.
  const maxPfn = start?.pages.length ?? Math.ceil(imported.maxPfn / ROUND_PAGES) * ROUND_PAGES;
  const end = imported.windowed && start !== undefined ? readEnd(folder) : undefined;
  const e820 = readE820(folder, maxPfn);
  const { events } = imported;
  const ram = e820.reduce((sum, range) => sum + range.end - range.start, 0);
  return {
    name,
    hash: traceHash({ events, e820, maxPfn, ...(start === undefined ? {} : { start }) }),
    nrCpus: imported.nrCpus,
    maxPfn,
    guestMemoryBytes: Math.ceil(ram / ROUND_PAGES) * ROUND_PAGES * PAGE_SIZE,
    e820,
    events,
    ...(start === undefined ? {} : { start }),
    ...(end === undefined ? {} : { end }),
    skipped: imported.skipped,
    marks: imported.marks,
  };
}

/** The state at `SNAP_start_END`: free, used by kind, on a per-CPU list; pageblock types adjusted to pagetypeinfo. */
function readStart(folder: string, path: string, imported: ImportedEvents): TraceStart {
  const raw = readMaybeGz(path);
  if (raw.length % 8 !== 0)
    throw new UserError(`${path}: ${raw.length} bytes are not whole 64-bit entries; is it truncated?`);
  const maxPfnFile = findFile(folder, 'max_pfn');
  const told = maxPfnFile === undefined ? 0 : Number(readMaybeGz(maxPfnFile).toString('latin1').trim());
  if (maxPfnFile !== undefined && !(Number.isSafeInteger(told) && told > 0))
    throw new UserError(`${maxPfnFile}: holds no page number`);
  if (raw.length === 0 || told > raw.length / 8)
    throw new UserError(
      `${path}: has ${raw.length / 8} entries, of ${told > 0 ? told : 'some'}; is it truncated?`,
    );
  const words = new Uint32Array(raw.buffer.slice(raw.byteOffset, raw.byteOffset + raw.length));
  const nr = told > 0 ? Math.min(told, words.length / 2) : words.length / 2;
  const pages = new Uint8Array(nr);
  for (let pfn = 0; pfn < nr; pfn++) {
    const low = words[2 * pfn] & KPF_USED;
    const high = words[2 * pfn + 1];
    // 640 KiB – 1 MiB is no RAM, whatever the flags say (VGA hole, option ROMs).
    if ((low & KPF_NOPAGE) !== 0 || (pfn >= VGA_HOLE_START && pfn < VGA_HOLE_END)) pages[pfn] = START_ABSENT;
    else if ((low & KPF_BUDDY) !== 0) pages[pfn] = START_FREE;
    else if ((high & KPF_RESERVED_HIGH) !== 0) pages[pfn] = START_RESERVED;
    else if ((low & (KPF_SLAB | KPF_PGTABLE)) !== 0) pages[pfn] = START_UNMOVABLE;
    else if ((low & (KPF_LRU | KPF_ANON)) !== 0) {
      const isFile = (low & KPF_ANON) === 0;
      pages[pfn] = START_MOVABLE | (isFile ? START_FILE : 0);
    } else if (low === 0 && high === 0 && imported.onPcpAtStart.has(pfn))
      pages[pfn] = START_PCP + (imported.onPcpAtStart.get(pfn) ?? 0);
    // Page cache of tmpfs may be swap-backed but off the LRU for a moment: it has SWAPBACKED and is not anonymous.
    else pages[pfn] = (low & KPF_SWAPBACKED) !== 0 ? START_MOVABLE | START_FILE : START_UNMOVABLE;
  }
  return { pages, pageblocks: pageblockTypes(folder, pages) };
}

/** Majority of the used pages of each block, then adjusted to the counts in pagetypeinfo, weakest majority first. */
function pageblockTypes(folder: string, pages: Uint8Array): Uint8Array {
  const nr = Math.ceil(pages.length / 512);
  const types = new Uint8Array(nr);
  const movableShare = new Float64Array(nr);
  for (let block = 0; block < nr; block++) {
    let movable = 0;
    let unmovable = 0;
    for (let pfn = block * 512; pfn < Math.min(pages.length, block * 512 + 512); pfn++) {
      const state = pages[pfn];
      if ((state & 7) === START_MOVABLE && state < START_PCP) movable++;
      else if (state === START_UNMOVABLE || state === START_RESERVED) unmovable++;
    }
    movableShare[block] = movable + unmovable === 0 ? 1 : movable / (movable + unmovable);
    types[block] = movableShare[block] >= 0.5 ? 1 : 0;
  }
  const info = findFile(folder, 'start.pagetypeinfo');
  if (info === undefined) return types;
  const zones = zoneBlocks(folder, nr);
  for (const match of rowsOf(info, /^Node\s+(\d+), zone\s+(\w+)((?:\s+\d+){3,})\s*$/gm)) {
    const counts = match[3].trim().split(/\s+/).map(Number);
    const [from, to] = zones(Number(match[1]), match[2]);
    const blocks = Array.from({ length: Math.min(to, nr) - from }, (_, i) => from + i).toSorted(
      (a, b) => movableShare[a] - movableShare[b],
    );
    // The least movable blocks are the unmovable ones; reclaimable follow.
    blocks.forEach((block, i) => {
      types[block] = i < counts[0] ? 0 : i < counts[0] + counts[2] ? 2 : 1;
    });
  }
  return types;
}

/**
 * Pageblocks `[from, to)` of a zone: from `start_pfn` and `spanned` in zoneinfo, or as x86 lays zones out where there is none.
 */
function zoneBlocks(folder: string, nr: number): (node: number, zone: string) => readonly [number, number] {
  const file = findFile(folder, 'start.zoneinfo') ?? findFile(folder, 'end.zoneinfo');
  const text = file === undefined ? '' : readMaybeGz(file).toString('latin1');
  const found = new Map<string, readonly [number, number]>();
  for (const section of text.split(/^(?=Node \d)/m)) {
    const name = /^Node (\d+), zone\s+(\w+)/.exec(section);
    const spanned = /^\s+spanned\s+(\d+)/m.exec(section);
    const start = /^\s+start_pfn:\s+(\d+)/m.exec(section);
    if (name === null || spanned === null || start === null) continue;
    const end = Number(start[1]) + Number(spanned[1]);
    found.set(`${name[1]} ${name[2]}`, [Math.floor(Number(start[1]) / 512), Math.ceil(end / 512)]);
  }
  const x86: Record<string, readonly [number, number]> = {
    DMA: [0, 8],
    DMA32: [8, 2048],
    Normal: [2048, nr],
  };
  return (node, zone) => found.get(`${node} ${zone}`) ?? x86[zone] ?? [0, 0];
}

/** The rows of a file of /proc that match; a file without any is none of them. */
function rowsOf(file: string, row: RegExp): RegExpExecArray[] {
  const rows = [...readMaybeGz(file).toString('latin1').matchAll(row)];
  if (rows.length === 0) throw new UserError(`${file}: has no such lines as it should; is it truncated?`);
  return rows;
}

function readEnd(folder: string): TraceEnd | undefined {
  const buddy = findFile(folder, 'end.buddyinfo');
  const zone = findFile(folder, 'end.zoneinfo');
  if (buddy === undefined || zone === undefined) return undefined;
  const freeByOrder = new Array<number>(11).fill(0);
  for (const match of rowsOf(buddy, /^Node\s+\d+, zone\s+\w+((?:\s+\d+)+)\s*$/gm)) {
    const counts = match[1].trim().split(/\s+/).map(Number);
    if (counts.length > freeByOrder.length)
      throw new UserError(`${buddy}: has ${counts.length} orders; a guest of Ebb has ${freeByOrder.length}`);
    counts.forEach((n, order) => (freeByOrder[order] += n));
  }
  const sum = (row: RegExp): number => rowsOf(zone, row).reduce((total, m) => total + Number(m[1]), 0);
  const pcpPages = sum(/^\s+count:\s+(\d+)$/gm);
  const pageCachePages = sum(/^\s+nr_file_pages\s+(\d+)$/gm);
  return {
    freeByOrder,
    freePages: freeByOrder.reduce((sum, n, order) => sum + n * 2 ** order, 0),
    pcpPages,
    pageCachePages,
  };
}

/** The usable ranges of the capture's e820 map; all but the hole at 640 KiB without a dmesg. */
function readE820(folder: string, maxPfn: number): { start: number; end: number }[] {
  const dmesg = findFile(folder, 'dmesg.txt');
  const ranges: { start: number; end: number }[] = [];
  if (dmesg !== undefined) {
    for (const match of readMaybeGz(dmesg)
      .toString('latin1')
      .matchAll(/BIOS-e820: \[mem (0x[0-9a-f]+)-(0x[0-9a-f]+)\] usable/g)) {
      const start = Math.ceil(Number(match[1]) / 4096);
      const end = Math.min(maxPfn, Math.floor((Number(match[2]) + 1) / 4096));
      if (start < end) ranges.push({ start, end });
    }
  }
  if (ranges.length > 0) return ranges;
  return [
    { start: 0, end: VGA_HOLE_START },
    { start: VGA_HOLE_END, end: maxPfn },
  ];
}
