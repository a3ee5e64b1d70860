/** What `--trace-out` writes of a replay is what the import of a capture reads. */
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { GFP_ATOMIC, GFP_NORETRY, GFP_NOWAIT, GFP_NO_KSWAPD, GFP_WRITE, GFP_ZERO } from '@ebb/guest-kernel';
import { MiB, PAGE_SIZE } from '@ebb/machine';
import { writeTraces } from '../cli-output.ts';
import { importTraceText } from '../trace/import.ts';
import { makePlan } from '../trace/replay-plan.ts';
import { TG_ZONE_SHIFT, traceHash, type Trace } from '../trace/trace.ts';
import { hostBuffers, runBuffers } from './buffers.ts';
import { fileStorage } from './file-storage.ts';
import { guestOf, REPLAY_DISK_BYTES } from './guest-of.ts';
import { runInline } from './inline-run.ts';
import { gfpNames } from './trace-writer.ts';

test('flags are written so that an import gives the same request', () => {
  for (const zone of [0, 1, 2, 3])
    for (const behaviour of [
      0,
      GFP_ATOMIC,
      GFP_NOWAIT,
      GFP_NORETRY,
      GFP_ZERO,
      GFP_WRITE,
      GFP_ZERO | GFP_NORETRY,
    ]) {
      const text = `x-1 [000] ..... 1.0: mm_page_alloc: page=1 pfn=0x5 order=0 migratetype=1 gfp_flags=${gfpNames(zone | behaviour)}`;
      const packed = importTraceText(text, 't').events.gfp[0];
      const wanted =
        (behaviour & ~(GFP_ZERO | GFP_WRITE)) |
        ((behaviour & GFP_ZERO) === 0 ? 0 : 1) |
        ((behaviour & GFP_WRITE) === 0 ? 0 : 2);
      expect([packed >> TG_ZONE_SHIFT, packed & 0xff]).toEqual([zone, wanted]);
    }
  expect(gfpNames(3 | GFP_NOWAIT | GFP_NO_KSWAPD)).toBe('GFP_TRANSHUGE_LIGHT');
});

test('a replay writes every event it applied, cache included, between the marks of a capture', () => {
  const line = (event: string, time: string): string => `x-1 [000] ..... ${time}: ${event}`;
  const text = [
    line(
      'mm_page_alloc: page=1 pfn=0x100 order=0 migratetype=1 gfp_flags=GFP_HIGHUSER_MOVABLE|__GFP_ZERO',
      '1.0',
    ),
    line('mm_filemap_add_to_page_cache: dev 8:1 ino 2a pfn=0x100 ofs=8192 order=0', '1.1'),
    line('mm_page_alloc: page=1 pfn=0x200 order=2 migratetype=0 gfp_flags=GFP_KERNEL', '1.2'),
    line('mm_filemap_delete_from_page_cache: dev 8:1 ino 2a pfn=0x100 ofs=8192 order=0', '1.3'),
    line('mm_page_free: page=1 pfn=0x100 order=0', '1.4'),
    line('mm_page_free: page=1 pfn=0x200 order=2', '1.5'),
  ].join('\n');
  const imported = importTraceText(text, 't');
  const maxPfn = (64 * MiB) / PAGE_SIZE;
  const shape = {
    events: imported.events,
    e820: [
      { start: 0, end: 160 },
      { start: 256, end: maxPfn },
    ],
    maxPfn,
  };
  const trace: Trace = {
    ...imported,
    ...shape,
    name: 't',
    hash: traceHash(shape),
    guestMemoryBytes: 64 * MiB,
  };
  const spec = {
    hostFrames: (128 * MiB) / PAGE_SIZE,
    backing: 'thp' as const,
    vms: [
      {
        bootAtNs: 0,
        guest: guestOf(trace, { vcpus: 1, balloon: false }),
        program: { kind: 'replay' as const, plan: makePlan(trace, 1) },
        diskBytes: REPLAY_DISK_BYTES,
      },
    ],
    vcpusPerVm: 1,
    workers: 1,
    sampleNs: 1e9,
    graceNs: 0,
    traceOut: true,
    poison: 'edges' as const,
  };
  const run = runInline(spec, runBuffers(spec, hostBuffers(128 * MiB)), (_vm, bytes) => fileStorage(bytes));
  const folder = mkdtempSync(join(tmpdir(), 'trace-out-'));
  writeTraces(
    join(folder, 'own'),
    run.allocTrace.map((l) => l.line),
    [],
  );
  const again = importTraceText(readFileSync(join(folder, 'own.trace.txt')), 'own');
  rmSync(folder, { recursive: true });
  expect(again.windowed).toBe(true);
  const columns = (e: typeof imported.events): unknown[] =>
    Array.from({ length: e.count }, (_, i) => [
      e.op[i],
      e.order[i],
      e.migratetype[i],
      e.gfp[i],
      e.file[i],
      e.index[i],
    ]);
  expect(columns(again.events)).toEqual(columns(imported.events));
});
