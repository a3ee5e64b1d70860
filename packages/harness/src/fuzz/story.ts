/**
 * A case told step by step: which thread did what, in order, ending with what broke; as text, and as a trace-event file
 * that Perfetto and Chrome open.
 */
import * as machine from '@ebb/machine';
import type { ScheduleEvent } from '@ebb/machine';
import type { FuzzCase } from './case-file.ts';
import { findProperty } from './properties.ts';
import { wordName } from './word-names.ts';

/** Names a word that an atomic operation touched, in a run whose guests have `maxPfn` pages. */
function touched(detail: number, maxPfn: number): string {
  const region = machine.SHARED_REGIONS[detail >> 24];
  const word = detail & 0xff_ffff;
  return region === undefined ? `word ${word}` : wordName(region, word, maxPfn);
}

/** One event in words. */
export function describeEvent({ point, detail }: ScheduleEvent, maxPfn: number): string {
  switch (point) {
    case 'load':
      return `loads ${touched(detail, maxPfn)}`;
    case 'store':
      return `stores ${touched(detail, maxPfn)}`;
    case 'rmw':
      return `exchanges ${touched(detail, maxPfn)}`;
    case 'wait':
      return `waits on ${touched(detail, maxPfn)}`;
    case 'notify':
      return `notifies ${touched(detail, maxPfn)}`;
    case 'translated':
      return `has translated to frame 0x${detail.toString(16)}, about to use it`;
    case 'device-access':
      return `a device is about to touch guest page 0x${detail.toString(16)}`;
    case 'owner-change':
      return `frame 0x${detail.toString(16)} is about to change owner`;
    case 'ept-write':
      return `writes the EPT entry in frame 0x${(detail >> 10).toString(16)}, index ${(detail & 1023) >> 1}`;
    case 'flush-request':
      return `asks vCPU ${detail} to flush`;
    case 'flush-ack':
      return 'has dropped its TLB, about to acknowledge';
    case 'section':
      return 'begins a guest section';
    case 'exit':
      return `exits (reason ${detail})`;
    case 'task-yield':
      return `runs host task ${detail}`;
    case 'task-choice':
      return `picks one of ${detail} ready host tasks`;
    case 'spin':
      return 'has to wait';
    case 'end':
      return 'ends';
    case 'start':
    case 'lock':
    case 'unlock':
    case 'doorbell':
    case 'index-publish':
    case 'device-wait':
    case 'stored':
      return `${point} ${detail}`;
  }
}

function threadName(thread: number): string {
  return thread === 0 ? 'host' : `vcpu${thread - 1}`;
}

/** The story: program, then the steps (the last `most`), then what broke. */
export function story(
  c: Pick<FuzzCase, 'property' | 'program'>,
  events: readonly ScheduleEvent[],
  found: readonly string[],
  most = 120,
): string {
  const { ramPages } = findProperty(c.property).shape;
  const lines = [`property ${c.property}`, '', 'program:'];
  const ops = (list: readonly { op: string; a: number; b: number }[]): string =>
    list.map(({ op, a, b }) => `${op}(${a}, ${b})`).join(' ') || 'nothing';
  lines.push(`  host   ${ops(c.program.host)}`);
  c.program.cpus.forEach((list, i) => lines.push(`  vcpu${i}  ${ops(list)}`));
  lines.push('', 'steps:');
  const from = Math.max(0, events.length - most);
  if (from > 0) lines.push(`  … ${from} earlier`);
  let last = -1;
  events.slice(from).forEach((event, i) => {
    const name = event.thread === last ? '' : threadName(event.thread);
    last = event.thread;
    lines.push(`  ${String(from + i).padStart(5)}  ${name.padEnd(6)} ${describeEvent(event, ramPages)}`);
  });
  lines.push('', 'found:', ...found.map((f) => `  ${f}`));
  return `${lines.join('\n')}\n`;
}

/** The same as a trace-event file: one step is a microsecond. Guests have `maxPfn` pages. */
export function perfetto(
  events: readonly ScheduleEvent[],
  found: readonly string[],
  threads: number,
  maxPfn: number,
): string {
  const traceEvents: object[] = Array.from({ length: threads }, (_, t) => ({
    name: 'thread_name',
    ph: 'M',
    pid: 1,
    tid: t,
    args: { name: threadName(t) },
  }));
  events.forEach((event, i) => {
    traceEvents.push({
      name: event.point,
      ph: 'X',
      pid: 1,
      tid: event.thread,
      ts: i,
      dur: 1,
      args: { what: describeEvent(event, maxPfn) },
    });
  });
  for (const what of found)
    traceEvents.push({ name: what, ph: 'i', s: 'g', pid: 1, tid: 0, ts: events.length });
  return `${JSON.stringify({ traceEvents, displayTimeUnit: 'ns' })}\n`;
}
