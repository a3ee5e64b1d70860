import { zstdCompressSync, zstdDecompressSync } from 'node:zlib';
import { describe, expect, test } from 'vitest';
import { fc, test as prop } from '@fast-check/vitest';
import { decodeTrace, encodeTrace } from './ebbtrace.ts';
import { importTraceText } from './import.ts';
import { makePlan, PLAN_FREE, PLAN_FREE_START, PLAN_SHARED } from './replay-plan.ts';
import {
  OP_ALLOC,
  OP_CACHE_ADD,
  OP_FREE,
  TG_WRITE,
  TG_ZERO,
  TG_ZONE_SHIFT,
  traceHash,
  UserError,
  type Trace,
} from './trace.ts';

const alloc =
  'mm_page_alloc: page=ffd4000000138200 pfn=0x4e08 order=1 migratetype=0 gfp_flags=GFP_KERNEL_ACCOUNT|__GFP_ZERO';
const line = (event: string, cpu = 0, time = '4.640781', task = 'init-1', flags = '.....'): string =>
  `            ${task}       [${String(cpu).padStart(3, '0')}] ${flags} ${time}: ${event}`;

describe('the input grammar', () => {
  test('reads tracefs text as captured', () => {
    const { events } = importTraceText(line(alloc, 1), 't');
    expect([events.count, events.op[0], events.pfn[0], events.order[0], events.cpu[0]]).toEqual([
      1,
      OP_ALLOC,
      0x4e08,
      1,
      1,
    ]);
  });
  test('reads trace-cmd report: no flags column, decimal pfn, page= with 0x', () => {
    const text =
      '            bash-4242  [003]  1234.567890: mm_page_free: page=0xffffea0000138200 pfn=19976 order=0';
    const { events } = importTraceText(text, 't');
    expect([events.op[0], events.pfn[0], events.cpu[0]]).toEqual([OP_FREE, 19976, 3]);
  });
  test('task names may hold spaces and dashes', () => {
    const { events } = importTraceText(line(alloc, 0, '1.000000', 'Web Content - x:1-77-312'), 't');
    expect(events.count).toBe(1);
  });
  test('what trace-cmd says before the events is no event; what the kernel lost is counted', () => {
    const text = [
      'version = 7',
      'CPU 1 is empty',
      'cpus=2',
      line(alloc),
      'CPU:0 [LOST 12 EVENTS]',
      'CPU:1 [3 EVENTS DROPPED]',
      'CPU:1 [EVENTS DROPPED]',
    ].join('\n');
    const { events, skipped } = importTraceText(text, 't');
    expect([events.count, Object.values(skipped)]).toEqual([1, [16]]);
    expect(Object.keys(skipped)[0]).toMatch(/^events lost by the kernel/);
  });
  test('trace-cmd names the function that wrote a mark; a page that is none is printed in three ways; flags may be a number', () => {
    const zero = 'mm_page_alloc: page=PAGE pfn=0x0 order=0 migratetype=0 gfp_flags=GFP_KERNEL';
    const text = [
      line(alloc),
      line('print: tracing_mark_write: SNAP_start_END'),
      ...['(null)', '(nil)', '0x0', '0000000000000000'].map((page) => line(zero.replace('PAGE', page))),
      line(alloc.replace(/gfp_flags=.*/, 'gfp_flags=0x100dca')),
      line('print: tracing_mark_write: SNAP_end_END'),
    ].join('\n');
    const { events, skipped, windowed } = importTraceText(text, 't');
    expect([windowed, events.count, Object.values(skipped)]).toEqual([true, 1, [4]]);
    // GFP_HIGHUSER_MOVABLE | __GFP_ZERO.
    expect(events.gfp[0]).toBe(TG_ZERO | (3 << TG_ZONE_SHIFT));
  });
  test('bytes are read as text is, however many', () => {
    const text = `${line(alloc)}\n`.repeat(200_000);
    expect(importTraceText(Buffer.from(text), 't').events.count).toBe(200_000);
  });
  test('a failed allocation is skipped and counted; other events too', () => {
    const text = [
      line(alloc),
      line('mm_page_alloc: page=(null) pfn=0x0 order=3 migratetype=0 gfp_flags=GFP_NOWAIT'),
      line('mm_vmscan_wakeup_kswapd: nid=0'),
    ].join('\n');
    expect(importTraceText(text, 't').skipped).toEqual({
      'failed allocation (page=(null))': 1,
      mm_vmscan_wakeup_kswapd: 1,
    });
  });
  test('mm_page_free_batched and the allocator’s own events drive nothing', () => {
    const text = [
      line(alloc),
      line('mm_page_free_batched: page=1 pfn=0x1 order=0'),
      line('mm_page_pcpu_drain: page=1 pfn=0x9 order=0 migratetype=1'),
    ].join('\n');
    const imported = importTraceText(text, 't');
    expect(imported.events.count).toBe(1);
    // Both pages of the order-1 allocation, and the drained one, sat on per-CPU lists.
    expect([...imported.onPcpAtStart.keys()]).toEqual([0x4e08, 0x4e09, 9]);
  });
  test('only the events between SNAP_start_END and SNAP_end_END are applied', () => {
    const text = [
      line(alloc),
      line('tracing_mark_write: SNAP_start_END'),
      line('mm_page_free: page=1 pfn=0x7 order=0'),
      line('tracing_mark_write: SNAP_end_END'),
      line(alloc),
    ].join('\n');
    const { events, onPcpAtStart } = importTraceText(text, 't');
    expect([events.count, events.op[0]]).toEqual([1, OP_FREE]);
    // What happened before the start state says nothing of it.
    expect([...onPcpAtStart.keys()]).toEqual([]);
  });
  test('all pages of a block that is freed were in use at the start', () => {
    const text = [
      line('mm_page_free: page=1 pfn=0x8 order=1'),
      line('mm_page_alloc: page=1 pfn=0x8 order=1 migratetype=0 gfp_flags=GFP_KERNEL'),
    ].join('\n');
    expect([...importTraceText(text, 't').onPcpAtStart.keys()]).toEqual([]);
  });
  test('gfp flags: write, zone and waiting', () => {
    const text = line(
      'mm_page_alloc: page=1 pfn=0x5 order=0 migratetype=1 gfp_flags=GFP_HIGHUSER_MOVABLE|__GFP_COMP|__GFP_WRITE',
    );
    const { events } = importTraceText(text, 't');
    expect([events.gfp[0] & TG_WRITE, events.gfp[0] >> TG_ZONE_SHIFT]).toEqual([TG_WRITE, 3]);
  });
});

describe('a bad trace is one line with its number and text', () => {
  test.each([
    ['a line that is none', `${line(alloc)}\nhello world`, /t: line 2: not a trace line: 'hello world'/],
    ['a missing field', line('mm_page_free: page=1 order=0'), /line 1: no valid pfn=/],
    ['a truncated field', line('mm_page_alloc: page=1 pfn=0x'), /line 1: no valid (pfn|order)=/],
    ['an order that cannot be', line('mm_page_free: page=1 pfn=0x1 order=12'), /order 12 is above 10/],
    [
      'an order that cannot be, of an event that drives nothing',
      `${line(alloc)}\n${line('mm_page_pcpu_drain: page=1 pfn=0x9 order=40 migratetype=1')}`,
      /t: line 2: order 40 is above 10/,
    ],
    [
      'a page that no guest has',
      line('mm_page_free: page=1 pfn=0xfffffffff order=0'),
      /line 1: page number 68719476735 is above 1 TiB/,
    ],
    [
      'a drain without a page',
      line('mm_page_pcpu_drain: page=1 order=0 migratetype=1'),
      /line 1: no valid pfn=/,
    ],
    ['no events at all', '# tracer: nop\n', /no page events/],
    ['flags cut off', line('mm_page_alloc: page=1 pfn=0x5 order=0 migratetype=1'), /line 1: no gfp_flags=/],
    [
      'time that goes back',
      `${line(alloc, 0, '9.000000')}\n${line(alloc, 0, '4.000000')}`,
      /t: line 2: goes back in time by 5.000 s/,
    ],
    [
      'a capture cut off before its end mark',
      `${line('tracing_mark_write: SNAP_start_END')}\n${line(alloc)}\n`,
      /line 2: ends before SNAP_end_END; is it truncated\? Its last line: '.*mm_page_alloc/,
    ],
  ])('%s', (_what, text, message) => {
    expect(() => importTraceText(text, 't')).toThrow(UserError);
    expect(() => importTraceText(text, 't')).toThrow(message);
  });
});

const asTrace = (text: string): Trace => {
  const imported = importTraceText(text, 't');
  const e820 = [{ start: 0, end: 16384 }];
  return {
    name: 't',
    hash: traceHash({ ...imported, e820 }),
    nrCpus: imported.nrCpus,
    maxPfn: imported.maxPfn,
    guestMemoryBytes: 1 << 26,
    e820,
    events: imported.events,
    skipped: {},
    marks: [],
  };
};

test('the hash covers all that a replay reads', () => {
  const cached = 'mm_filemap_add_to_page_cache: dev 8:1 ino 1f page=1 pfn=0x4e08 ofs=4096';
  const hashed = (text: string, more: Partial<Trace> = {}): string =>
    traceHash({ ...asTrace(text), ...more });
  const text = `${line(alloc)}\n${line(cached)}`;
  const pages = new Uint8Array(8);
  const pageblocks = new Uint8Array(1);
  const { events } = asTrace(text);
  const hour = (h: number): Partial<Trace> => ({
    events: { ...events, timeUs: Float64Array.from(events.timeUs, (t) => t + h * 2 ** 32) },
  });
  const hashes = [
    hashed(text),
    // Differences of whole multiples of 2³²: 71.6 minutes, 16 TiB of a file.
    hashed(text, hour(1)),
    hashed(text, hour(2)),
    hashed(text, { events: { ...events, index: Float64Array.from(events.index, (i) => i + 2 ** 32) } }),
    hashed(text.replace('ofs=4096', 'ofs=8192')),
    hashed(text.replace('migratetype=0', 'migratetype=1')),
    hashed(text, { e820: [{ start: 1, end: 16384 }] }),
    hashed(text, { start: { pages, pageblocks } }),
    hashed(text, { start: { pages: new Uint8Array(8).fill(1, 7), pageblocks } }),
  ];
  expect(new Set(hashes).size).toBe(hashes.length);
  // Nor do upper halves pass for fields behind them.
  const ranges = (...e820: [number, number][]): string =>
    hashed(text, { e820: e820.map(([start, end]) => ({ start, end })) });
  expect(ranges([1 + 2 * 2 ** 32, 3])).not.toBe(ranges([1, 2 + 3 * 2 ** 32]));
  expect(hashed(text)).toBe(hashes[0]);
});

describe('.ebbtrace', () => {
  prop.prop([fc.array(fc.tuple(fc.nat(16000), fc.boolean(), fc.nat(3)), { minLength: 1, maxLength: 50 })])(
    'what is written is read back',
    (list) => {
      const text = list
        .map(([pfn, free, cpu], i) =>
          line(
            free
              ? `mm_page_free: page=1 pfn=0x${pfn.toString(16)} order=0`
              : `mm_page_alloc: page=1 pfn=${pfn} order=0 migratetype=1 gfp_flags=GFP_KERNEL`,
            cpu,
            `${i}.000125`,
          ),
        )
        .join('\n');
      const trace = asTrace(text);
      const back = decodeTrace(encodeTrace(trace), 'x');
      expect({ ...back, events: null }).toEqual({ ...trace, events: null });
      expect([...back.events.pfn]).toEqual([...trace.events.pfn]);
      expect([...back.events.timeUs]).toEqual([...trace.events.timeUs].map(Math.round));
    },
  );
  test('events an hour apart, and page indices beyond 8 TiB, are read back', () => {
    const trace = asTrace(
      [line(alloc, 0, '1.0'), line(alloc, 0, '5000.5'), line(alloc, 0, '5000.6')].join('\n'),
    );
    const index = Float64Array.of(3, 2 ** 40 + 5, 2 ** 31);
    const events = { ...trace.events, index };
    const back = decodeTrace(encodeTrace({ ...trace, events, hash: traceHash({ ...trace, events }) }), 'x');
    expect([...back.events.timeUs]).toEqual([...trace.events.timeUs].map(Math.round));
    expect([...back.events.index]).toEqual([...index]);
  });
  test('a file whose checksum is sound and whose contents are not is the user’s mistake as well', () => {
    const bytes = zstdDecompressSync(encodeTrace(asTrace(line(alloc))));
    const length = bytes.readUInt32LE(8);
    const header = JSON.parse(bytes.toString('utf8', 12, 12 + length)) as { trace: object };
    const columns = bytes.subarray(12 + length);
    const made = (json: string, rest = columns): Uint8Array => {
      const head = Buffer.from(json);
      const size = Buffer.alloc(4);
      size.writeUInt32LE(head.length);
      return zstdCompressSync(Buffer.concat([bytes.subarray(0, 8), size, head, rest]));
    };
    const changed = (trace: object, more: object = {}): string =>
      JSON.stringify({ ...header, ...more, trace: { ...header.trace, ...trace } });
    expect(decodeTrace(made(changed({})), 'x').events.count).toBe(1);
    for (const json of [
      'null',
      '{',
      '{}',
      changed({}, { count: -5 }),
      changed({}, { count: 'abc' }),
      changed({ nrCpus: -1 }),
      changed({ e820: [null] }),
      changed({ marks: null }),
      changed({ end: {} }),
      changed({ guestMemoryBytes: 1e18 }),
    ])
      expect(() => decodeTrace(made(json), 'x.ebbtrace'), json).toThrow(
        /^x\.ebbtrace: its header makes no sense/,
      );
    for (const [json, rest] of [
      [changed({}), columns.map(() => 0xff)],
      [changed({ maxPfn: 10 }), columns],
      [changed({}, { count: 0 }), columns],
    ] as const)
      expect(() => decodeTrace(made(json, Buffer.from(rest)), 'x'), json).toThrow(/not those of its hash/);
  });
  test('a damaged file is the user’s mistake, in one line', () => {
    const bytes = encodeTrace(asTrace(line(alloc)));
    expect(() => decodeTrace(bytes.subarray(0, 40), 'x.ebbtrace')).toThrow(
      /x.ebbtrace: (not an .ebbtrace file|truncated)/,
    );
    expect(() => decodeTrace(new Uint8Array(10), 'y')).toThrow(UserError);
    // A bit that is wrong is found, or means nothing.
    const sound = decodeTrace(bytes, 'z');
    const readOrWhy = (damaged: Uint8Array): unknown => {
      try {
        return decodeTrace(damaged, 'z');
      } catch (error) {
        return (error as Error).message;
      }
    };
    let found = 0;
    for (let at = 8; at < bytes.length; at++) {
      const flipped = Uint8Array.from(bytes);
      flipped[at] ^= 1 << (at % 8);
      const read = readOrWhy(flipped);
      if (typeof read === 'string') found += read.startsWith('z: not an .ebbtrace file, or damaged') ? 1 : 0;
      else expect(read).toEqual(sound);
    }
    expect(found).toBeGreaterThan(bytes.length / 2);
  });
});

describe('the replay plan', () => {
  test('a free belongs to the newest allocation of its page; a start page is freed by its pfn; an unknown one is counted', () => {
    const text = [
      line('mm_page_alloc: page=1 pfn=0x10 order=0 migratetype=1 gfp_flags=GFP_KERNEL', 0),
      line('mm_page_free: page=1 pfn=0x10 order=0', 1),
      line('mm_page_alloc: page=1 pfn=0x10 order=0 migratetype=1 gfp_flags=GFP_KERNEL', 1),
      line('mm_page_free: page=1 pfn=0x10 order=0', 1),
      line('mm_page_free: page=1 pfn=0x20 order=0', 1),
      line('mm_page_free: page=1 pfn=0x21 order=0', 1),
    ].join('\n');
    const trace = asTrace(text);
    const pages = new Uint8Array(16384).fill(1);
    pages[0x20] = 2;
    const plan = makePlan({ ...trace, maxPfn: 16384, start: { pages, pageblocks: new Uint8Array(32) } }, 2);
    expect([...plan.handle.subarray(0, plan.count)]).toEqual([0, 0, 1, 1, 0x20]);
    expect(plan.op[1]).toBe(PLAN_FREE);
    expect(plan.op[4]).toBe(PLAN_FREE_START);
    // The first allocation's events come from two CPUs and wait for one another.
    expect([plan.flags[0] & PLAN_SHARED, plan.flags[2] & PLAN_SHARED, plan.ordinal[1]]).toEqual([
      PLAN_SHARED,
      0,
      1,
    ]);
    expect(plan.dropped).toEqual({ 'free of an unknown page': 1 });
  });
  test('events of one page on two CPUs keep their order, however many they are', () => {
    const cache = (op: string): string =>
      `mm_filemap_${op}_page_cache: dev 254:0 ino c68 pfn=0x10 ofs=0 order=0`;
    const text = [
      line('mm_page_alloc: page=1 pfn=0x10 order=0 migratetype=1 gfp_flags=GFP_KERNEL', 0),
      ...Array.from({ length: 300 }, (_, i) => line(cache(i % 2 === 0 ? 'add_to' : 'delete_from'), i % 2)),
    ].join('\n');
    const plan = makePlan(asTrace(text), 2);
    expect([...plan.ordinal.subarray(0, 301)]).toEqual(Array.from({ length: 301 }, (_, i) => i));
  });
  test('page cache events refer to the page they name', () => {
    const text = [
      line('mm_page_alloc: page=1 pfn=0x10 order=0 migratetype=1 gfp_flags=GFP_KERNEL', 0),
      line('mm_filemap_add_to_page_cache: dev 254:0 ino c68 pfn=0x10 ofs=8192 order=0', 0),
    ].join('\n');
    const plan = makePlan(asTrace(text), 1);
    expect([plan.op[1], plan.handle[1], plan.file[1], plan.index[1]]).toEqual([OP_CACHE_ADD, 0, 0, 2]);
  });
});
