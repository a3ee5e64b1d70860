/** A capture folder, written here: what its text files say about the start state. */
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { readCapture } from './capture.ts';
import { UserError } from './trace.ts';

const KPF_BUDDY = 1 << 10;
let folder = '';

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'capture-'));
});
afterEach(() => {
  rmSync(folder, { recursive: true });
});

const zone = (node: number, name: string, start: number, spanned: number): string =>
  `Node ${node}, zone ${name.padStart(8)}\n        spanned  ${spanned}\n  start_pfn:           ${start}\n`;

/** Writes a capture of free pages; `files` beside its trace and page flags. */
function capture(pages: number, files: Record<string, string>): void {
  const stamp = (event: string): string => `    x-1     [000] .....     1.000000: ${event}\n`;
  writeFileSync(
    join(folder, 'trace.txt'),
    stamp('tracing_mark_write: SNAP_start_END') +
      stamp('mm_page_alloc: page=1 pfn=0x200 order=0 migratetype=1 gfp_flags=GFP_KERNEL') +
      stamp('tracing_mark_write: SNAP_end_END'),
  );
  writeFileSync(join(folder, 'start.kpageflags'), new BigUint64Array(pages).fill(BigInt(KPF_BUDDY)));
  for (const [name, text] of Object.entries(files)) writeFileSync(join(folder, name), text);
}

test('pageblock types are counted per zone, where zoneinfo says the zone lies', () => {
  const pagetypeinfo = [
    'Node 0, zone      DMA            0            8            0            0            0',
    'Node 0, zone    DMA32            1            1            0            0            0',
    'Node 0, zone   Normal            0            2            0            0            0',
    'Node 1, zone   Normal            0            1            1            0            0',
  ].join('\n');
  const zoneinfo =
    zone(0, 'DMA', 1, 4095) +
    zone(0, 'DMA32', 4096, 1024) +
    zone(0, 'Normal', 5120, 1024) +
    zone(1, 'Normal', 6144, 1024);
  capture(7168, { 'start.pagetypeinfo': pagetypeinfo, 'start.zoneinfo': zoneinfo });
  const types = readCapture(folder).start?.pageblocks ?? [];
  expect(Array.from(types).slice(8)).toEqual([0, 1, 1, 1, 2, 1]);
});

test('without zoneinfo DMA32 ends at 4 GiB', () => {
  const pagetypeinfo = [
    'Node 0, zone    DMA32            2         2038            0            0            0',
    'Node 0, zone   Normal            0            2            0            0            0',
  ].join('\n');
  capture(2050 * 512, { 'start.pagetypeinfo': pagetypeinfo });
  const types = readCapture(folder).start?.pageblocks ?? [];
  expect([types[8], types[9], types[10], types[2048], types[2049]]).toEqual([0, 0, 1, 1, 1]);
});

test('a folder that lacks its end mark, or whose states are cut off or hold something else, is the user’s mistake', () => {
  const mistakes: readonly (readonly [Record<string, string>, RegExp])[] = [
    [
      { 'trace.txt': 'x-1 [000] ..... 1.0: tracing_mark_write: SNAP_start_END\n' },
      /line 1: ends before SNAP_end_END/,
    ],
    [
      { 'trace.txt': 'x-1 [000] ..... 1.0: tracing_mark_write: SNAP_start_END\nx-1 [000] ..... 1.0: mm_pa' },
      /trace.txt: line 2: does not end; is the file truncated\?: 'x-1 \[000\] ..... 1.0: mm_pa'/,
    ],
    [{ max_pfn: 'abc' }, /max_pfn: holds no page number/],
    [{ max_pfn: '9000' }, /start.kpageflags: has 7168 entries, of 9000; is it truncated\?/],
    [{ 'start.kpageflags': '' }, /start.kpageflags: has 0 entries/],
    [{ 'start.pagetypeinfo': 'nonsense' }, /start.pagetypeinfo: has no such lines/],
    [
      { 'end.buddyinfo': 'hello', 'end.zoneinfo': zone(0, 'DMA', 1, 4095) },
      /end.buddyinfo: has no such lines/,
    ],
    [{ 'end.buddyinfo': 'Node 0, zone DMA 1 2 3', 'end.zoneinfo': '' }, /end.zoneinfo: has no such lines/],
  ];
  for (const [files, message] of mistakes) {
    capture(7168, files);
    expect(() => readCapture(folder)).toThrow(message);
    expect(() => readCapture(folder)).toThrow(UserError);
    rmSync(folder, { recursive: true });
    mkdirSync(folder);
  }
});

test('without a start state the guest is as large as its memory is said to be', () => {
  capture(4096, {});
  rmSync(join(folder, 'start.kpageflags'));
  const trace = readCapture(folder);
  expect([trace.maxPfn * 4096, trace.guestMemoryBytes]).toEqual([64 << 20, 64 << 20]);
  expect(trace.e820).toEqual([
    { start: 0, end: 160 },
    { start: 256, end: 16384 },
  ]);
});

test('a range of the firmware’s map is rounded inward: a page that is only in part RAM is none', () => {
  capture(4096, { 'dmesg.txt': '[0.0] BIOS-e820: [mem 0x0000000000000800-0x00000000000047ff] usable\n' });
  expect(readCapture(folder).e820).toEqual([{ start: 1, end: 4 }]);
});

test('a hole below 4 GiB is not memory of the guest', () => {
  capture(2048, {
    'dmesg.txt':
      '[0.0] BIOS-e820: [mem 0x0000000000000000-0x00000000003fffff] usable\n' +
      '[0.0] BIOS-e820: [mem 0x0000000000600000-0x00000000007fffff] usable\n',
  });
  const small = readCapture(folder);
  expect([small.maxPfn, small.guestMemoryBytes]).toEqual([2048, 64 << 20]);
  capture(40960, {
    'dmesg.txt':
      '[0.0] BIOS-e820: [mem 0x0000000000000000-0x0000000003ffffff] usable\n' +
      '[0.0] BIOS-e820: [mem 0x0000000006000000-0x0000000009ffffff] usable\n',
  });
  expect(readCapture(folder).guestMemoryBytes).toBe(128 << 20);
});
