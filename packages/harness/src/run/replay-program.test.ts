/** Traces written here, replayed on a small guest: what must hold whatever a capture holds. */
import { expect, test } from 'vitest';
import { Arena, freePages, pcpPages } from '@ebb/guest-kernel';
import { MiB, NS_PER_S, PAGE_SIZE } from '@ebb/machine';
import { importTraceText } from '../trace/import.ts';
import { makePlan } from '../trace/replay-plan.ts';
import { VGA_HOLE_END, VGA_HOLE_START } from '../trace/vga-hole.ts';
import type { Trace } from '../trace/trace.ts';
import { hostBuffers, runBuffers } from './buffers.ts';
import { fileStorage } from './file-storage.ts';
import { guestOf, REPLAY_DISK_BYTES } from './guest-of.ts';
import { runInline } from './inline-run.ts';
import type { RunResult } from './run-result.ts';

const GUEST = 64 * MiB;
const PAGES = GUEST / PAGE_SIZE;

/** Lines of a trace, 10 µs apart unless `wait` says more. */
class Writer {
  readonly lines: string[] = [];
  #time = 1;

  alloc(cpu: number, pfn: number, order = 0, gfp = 'GFP_HIGHUSER_MOVABLE'): void {
    this.#line(cpu, `mm_page_alloc: page=1 pfn=${pfn} order=${order} migratetype=1 gfp_flags=${gfp}`);
  }
  free(cpu: number, pfn: number, order = 0): void {
    this.#line(cpu, `mm_page_free: page=1 pfn=${pfn} order=${order}`);
  }
  wait(seconds: number): void {
    this.#time += seconds;
  }
  #line(cpu: number, event: string): void {
    this.#time += 0.000_01;
    this.lines.push(`x-1 [${String(cpu).padStart(3, '0')}] ..... ${this.#time.toFixed(6)}: ${event}`);
  }
}

/** Replays on a freshly booted guest of two vCPUs: the run, and its free pages at the end. */
function replay(trace: Writer): { result: RunResult; free: number } {
  const imported = importTraceText(trace.lines.join('\n'), 'written');
  const captured: Trace = {
    ...imported,
    name: 'written',
    hash: '',
    maxPfn: PAGES,
    guestMemoryBytes: GUEST,
    e820: [
      { start: 0, end: VGA_HOLE_START },
      { start: VGA_HOLE_END, end: PAGES },
    ],
  };
  const plan = makePlan(captured, 2);
  const guest = guestOf(captured, { vcpus: 2, balloon: false });
  const spec = {
    hostFrames: (192 * MiB) / PAGE_SIZE,
    backing: 'thp' as const,
    vms: [{ bootAtNs: 0, guest, program: { kind: 'replay' as const, plan }, diskBytes: REPLAY_DISK_BYTES }],
    vcpusPerVm: 2,
    workers: 2,
    sampleNs: NS_PER_S,
    graceNs: 0,
    traceOut: false,
    poison: 'edges' as const,
  };
  const buffers = runBuffers(spec, hostBuffers(192 * MiB));
  const { result } = runInline(spec, buffers, (_vm, bytes) => fileStorage(bytes));
  const arena = new Arena(buffers.arenas[0], guest.maxPfn);
  return { result, free: freePages(arena) + pcpPages(arena, 2) };
}

test('a huge page made of small ones is freed by whichever vCPU the trace says', () => {
  const endsWith = (cpu: number, huge = 10): { result: RunResult; free: number } => {
    const trace = new Writer();
    // Every other page of nearly all memory stays: no huge page can be had.
    for (let pfn = 1; pfn < 14_400; pfn++) trace.alloc(0, pfn);
    for (let pfn = 1; pfn < 14_400; pfn += 2) trace.free(0, pfn);
    for (let i = 0; i < huge; i++) {
      trace.wait(0.1);
      trace.alloc(0, 15_360, 9, 'GFP_TRANSHUGE_LIGHT');
      trace.wait(0.1);
      trace.free(cpu, 15_360, 9);
    }
    return replay(trace);
  };
  const [none, same, other] = [endsWith(0, 0), endsWith(0), endsWith(1)];
  expect([same.result.ok, other.result.ok]).toEqual([true, true]);
  expect([same.free, other.free]).toEqual([none.free, none.free]);
});

test('a trace that fills its guest to the last page touches nothing that is not memory', () => {
  const trace = new Writer();
  for (let pfn = 1; pfn < 14_500; pfn++) trace.alloc(pfn % 2, pfn);
  for (let pfn = 1; pfn < 14_500; pfn++) trace.free(pfn % 2, pfn);
  const { result } = replay(trace);
  expect([result.ok, result.ledgerViolations]).toEqual([true, 0]);
});
