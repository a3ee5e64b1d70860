/**
 * Reads tracefs text — `trace`, `trace_pipe`, `trace-cmd report` — into a `Trace`. The flags column is optional, task
 * names may hold spaces and dashes, pfns are hexadecimal or decimal, `page=` with or without `0x`.
 *
 * Only four events drive a replay; `mm_page_free_batched` always follows a free of the same page, and the allocator's
 * own events (`zone_locked`, `pcpu_drain`, `extfrag`) are ours to make. Any other event is counted and skipped; a line
 * that is none, or misses a field, is the user's mistake: line number and text.
 */
import {
  OP_ALLOC,
  OP_CACHE_ADD,
  OP_CACHE_DELETE,
  OP_FREE,
  TG_ATOMIC,
  TG_NORETRY,
  TG_NO_KSWAPD,
  TG_NOWAIT,
  TG_THISNODE,
  TG_WRITE,
  TG_ZERO,
  TG_ZONE_SHIFT,
  UserError,
  type TraceEvents,
} from './trace.ts';

/** Pages of 1 TiB: a number beyond is no page of a guest we could replay, and does not fit the tables. */
const MAX_PFN = 2 ** 28;
const MAX_ORDER = 10;
/** A page number or a count: `0x…` or decimal. */
const NUMBER = /^(0x[0-9a-f]+|\d+)$/i;
/** `TASK-PID [CPU] FLAGS TIME: EVENT: FIELDS`; the task may hold anything, the flags may be absent. */
const LINE = /^.*?-\d+\s+(?:\([^)]*\)\s+)?\[(\d+)\]\s+(?:\S{4,8}\s+)?(\d+\.\d+): (\w+): ?(.*)$/;
/** What `trace-cmd report` says before the events. */
const PREAMBLE = /^(cpus=\d+|version = \d+|CPU \d+ is empty)$/;
/** What stands where a reader was too slow: in tracefs, and in `trace-cmd report`, which may not know how many. */
const LOST = /^\s*CPU:\d+ \[(?:LOST (\d+) EVENTS|(?:(\d+) )?EVENTS DROPPED)\]$/;
const IGNORED = new Set([
  'mm_page_free_batched',
  'mm_page_alloc_zone_locked',
  'mm_page_pcpu_drain',
  'mm_page_alloc_extfrag',
]);

/** Growing columns. */
class Columns {
  readonly timeUs: number[] = [];
  readonly op: number[] = [];
  readonly cpu: number[] = [];
  readonly pfn: number[] = [];
  readonly order: number[] = [];
  readonly migratetype: number[] = [];
  readonly gfp: number[] = [];
  readonly file: number[] = [];
  readonly index: number[] = [];

  push(timeUs: number, op: number, cpu: number, pfn: number, order: number): void {
    this.timeUs.push(timeUs);
    this.op.push(op);
    this.cpu.push(cpu);
    this.pfn.push(pfn);
    this.order.push(order);
    this.migratetype.push(0);
    this.gfp.push(0);
    this.file.push(-1);
    this.index.push(0);
  }

  freeze(): TraceEvents {
    return {
      count: this.op.length,
      timeUs: Float64Array.from(this.timeUs),
      op: Uint8Array.from(this.op),
      cpu: Uint8Array.from(this.cpu),
      pfn: Int32Array.from(this.pfn),
      order: Uint8Array.from(this.order),
      migratetype: Uint8Array.from(this.migratetype),
      gfp: Uint16Array.from(this.gfp),
      file: Int32Array.from(this.file),
      index: Float64Array.from(this.index),
    };
  }
}

export interface ImportedEvents {
  readonly events: TraceEvents;
  readonly nrCpus: number;
  readonly maxPfn: number;
  readonly skipped: Record<string, number>;
  readonly marks: { timeUs: number; name: string }[];
  /** Pages whose first event is an allocation without a `zone_locked`, or a drain: the CPU on whose list each sat. */
  readonly onPcpAtStart: Map<number, number>;
  /** The window between `SNAP_start_END` and `SNAP_end_END` was found and applied. */
  readonly windowed: boolean;
}

/** Lines of a text, or of bytes of any length: a string holds half a GiB at most. */
function* linesOf(text: string | Uint8Array): Generator<string, void, void> {
  const PIECE = 1 << 24;
  if (typeof text === 'string') {
    const lines = text.split('\n');
    if (lines.at(-1) === '') lines.pop();
    yield* lines;
    return;
  }
  const decoder = new TextDecoder('latin1');
  let rest = '';
  for (let at = 0; at < text.length; at += PIECE) {
    const lines = (rest + decoder.decode(text.subarray(at, at + PIECE))).split('\n');
    rest = lines.pop() ?? '';
    yield* lines;
  }
  if (rest !== '') yield rest;
}

/** A step back in time up to this is two CPUs' clocks apart; more is another trace, or a damaged one. */
const CLOCK_SKEW_US = 10_000;

/** Parses the text of a trace. `source` names it in messages. Throws `UserError` with line number and text. */
export function importTraceText(text: string | Uint8Array, source: string): ImportedEvents {
  let columns = new Columns();
  let skipped: Record<string, number> = {};
  const marks: { timeUs: number; name: string }[] = [];
  const files = new Map<string, number>();
  const seen = new Set<number>();
  const onPcp = new Map<number, number>();
  let origin = -1;
  let nrCpus = 1;
  let maxPfn = 0;
  let lineNumber = 0;
  let windowed = false;
  let ended = false;
  let lastLine = '';
  /** The pages of a block that no event has named yet were in use, or, with `cpu` ≥ 0, on that CPU's list. */
  const touch = (pfn: number, order: number, cpu: number): void => {
    for (let p = pfn; p < pfn + 2 ** order; p++) {
      if (seen.has(p)) continue;
      seen.add(p);
      if (cpu >= 0) onPcp.set(p, cpu);
    }
  };
  const fail = (line: string, why: string): never => {
    throw new UserError(
      `${source}: line ${lineNumber}: ${why}: '${line.length > 120 ? `${line.slice(0, 120)}…` : line}'`,
    );
  };
  let last = 0;
  for (const raw of linesOf(text)) {
    if (ended) break;
    const line = raw.trimEnd();
    lineNumber++;
    if (line === '' || line.startsWith('#') || PREAMBLE.test(line)) continue;
    lastLine = line;
    const lost = LOST.exec(line);
    if (lost !== null) {
      const what = 'events lost by the kernel (its ring buffer was too small)';
      skipped[what] = (skipped[what] ?? 0) + Number(lost[1] ?? lost[2] ?? 1);
      continue;
    }
    const match = LINE.exec(line);
    if (match === null) return fail(line, 'not a trace line');
    const cpu = Number(match[1]);
    const timeUs = Number(match[2]) * 1e6;
    const event = match[3];
    const fields = match[4];
    if (origin < 0) origin = timeUs;
    if (timeUs < last - CLOCK_SKEW_US)
      return fail(line, `goes back in time by ${((last - timeUs) / 1e6).toFixed(3)} s`);
    last = Math.max(last, timeUs);
    if (cpu > 63) return fail(line, `CPU ${cpu} is out of range`);
    nrCpus = Math.max(nrCpus, cpu + 1);
    const field = (name: string): string | undefined => {
      const from = fields.indexOf(`${name}=`);
      if (from < 0) return undefined;
      const start = from + name.length + 1;
      const end = fields.indexOf(' ', start);
      return end < 0 ? fields.slice(start) : fields.slice(start, end);
    };
    const number = (name: string): number => {
      const text = field(name) ?? '';
      const value = Number(text);
      if (!NUMBER.test(text) || !Number.isSafeInteger(value)) fail(line, `no valid ${name}=`);
      return value;
    };
    const order = (): number => {
      const value = number('order');
      if (value > MAX_ORDER) fail(line, `order ${value} is above ${MAX_ORDER}`);
      return value;
    };
    const page = (): number => {
      const value = number('pfn');
      if (value >= MAX_PFN) fail(line, `page number ${value} is above 1 TiB`);
      return value;
    };
    if (event === 'tracing_mark_write' || event === 'print') {
      // `trace-cmd report` calls the event `print` and puts the function before the text.
      const name = (event === 'print' ? fields.replace(/^\S+: /, '') : fields).trim();
      marks.push({ timeUs: timeUs - origin, name });
      if (name === 'SNAP_start_END') {
        // Everything before is in the start state already.
        columns = new Columns();
        skipped = {};
        seen.clear();
        onPcp.clear();
        windowed = true;
      } else if (name === 'SNAP_end_END') ended = true;
      continue;
    }
    if (event === 'mm_page_alloc_zone_locked') touch(page(), order(), -1);
    // Drained before anything else happened to it: it sat on a per-CPU list, too (docs/decisions/0003).
    if (event === 'mm_page_pcpu_drain') touch(page(), order(), cpu);
    if (IGNORED.has(event)) continue;
    switch (event) {
      case 'mm_page_alloc': {
        // How `%p` prints no page depends on who prints.
        if (/^(\(null\)|\(nil\)|(0x)?0+)$/.test(field('page') ?? '')) {
          skipped['failed allocation (page=(null))'] = (skipped['failed allocation (page=(null))'] ?? 0) + 1;
          break;
        }
        const pfn = page();
        const allocated = order();
        columns.push(timeUs - origin, OP_ALLOC, cpu, pfn, allocated);
        const row = columns.op.length - 1;
        columns.migratetype[row] = Math.min(2, number('migratetype'));
        const flags = /gfp_flags=(\S+)/.exec(fields)?.[1] ?? fail(line, 'no gfp_flags=');
        columns.gfp[row] = /^0x[0-9a-f]+$/i.test(flags) ? gfpOfBits(Number(flags)) : packGfp(flags);
        touch(pfn, allocated, cpu);
        maxPfn = Math.max(maxPfn, pfn + 2 ** allocated);
        break;
      }
      case 'mm_page_free': {
        const pfn = page();
        const freed = order();
        columns.push(timeUs - origin, OP_FREE, cpu, pfn, freed);
        touch(pfn, freed, -1);
        maxPfn = Math.max(maxPfn, pfn + 2 ** freed);
        break;
      }
      case 'mm_filemap_add_to_page_cache':
      case 'mm_filemap_delete_from_page_cache': {
        const key = /dev (\S+) ino (\S+) /.exec(fields);
        if (key === null) return fail(line, 'no dev and ino');
        const id = files.get(`${key[1]}/${key[2]}`) ?? files.size;
        files.set(`${key[1]}/${key[2]}`, id);
        const op = event === 'mm_filemap_add_to_page_cache' ? OP_CACHE_ADD : OP_CACHE_DELETE;
        columns.push(timeUs - origin, op, cpu, page(), field('order') === undefined ? 0 : order());
        columns.file[columns.op.length - 1] = id;
        columns.index[columns.op.length - 1] = Math.floor(number('ofs') / 4096);
        break;
      }
      default:
        skipped[event] = (skipped[event] ?? 0) + 1;
    }
  }
  if (windowed && !ended) fail(lastLine, 'ends before SNAP_end_END; is it truncated? Its last line');
  const events = columns.freeze();
  if (events.count === 0)
    throw new UserError(`${source}: no page events in it; capture kmem:mm_page_alloc and kmem:mm_page_free`);
  return { events, nrCpus, maxPfn, skipped, marks, onPcpAtStart: onPcp, windowed };
}

/** The same from the number, where nobody knew the names: bits as Linux 6.12 has them (`gfp_types.h`). */
function gfpOfBits(value: number): number {
  const has = (bit: number): boolean => ((value >>> bit) & 1) !== 0;
  const [dma, dma32, movable, high, zero, direct, kswapd, write, noretry, thisnode] = [
    0, 2, 3, 5, 8, 10, 11, 12, 16, 21,
  ].map(has);
  return (
    (zero ? TG_ZERO : 0) |
    (write ? TG_WRITE : 0) |
    (noretry ? TG_NORETRY : 0) |
    (thisnode ? TG_THISNODE : 0) |
    (direct ? 0 : high ? TG_ATOMIC : TG_NOWAIT) |
    (kswapd ? 0 : TG_NO_KSWAPD) |
    ((dma ? 0 : dma32 ? 1 : movable ? 3 : 2) << TG_ZONE_SHIFT)
  );
}

/** The bits a replay needs from a `gfp_flags=` text. */
function packGfp(text: string): number {
  let bits = 0;
  let zone = 2;
  for (const flag of text.trim().split('|')) {
    switch (flag) {
      case '__GFP_ZERO':
        bits |= TG_ZERO;
        break;
      case '__GFP_WRITE':
        bits |= TG_WRITE;
        break;
      case '__GFP_NORETRY':
        bits |= TG_NORETRY;
        break;
      case '__GFP_THISNODE':
        bits |= TG_THISNODE;
        break;
      case 'GFP_ATOMIC':
        bits |= TG_ATOMIC;
        break;
      case 'GFP_NOWAIT':
        bits |= TG_NOWAIT;
        break;
      case 'GFP_TRANSHUGE_LIGHT':
        bits |= TG_NOWAIT | TG_NO_KSWAPD;
        zone = 3;
        break;
      case 'GFP_TRANSHUGE':
      case 'GFP_HIGHUSER_MOVABLE':
      case '__GFP_MOVABLE':
        zone = 3;
        break;
      case 'GFP_DMA':
      case '__GFP_DMA':
        zone = 0;
        break;
      case 'GFP_DMA32':
      case '__GFP_DMA32':
        zone = 1;
        break;
      default:
        break;
    }
  }
  return bits | (zone << TG_ZONE_SHIFT);
}
