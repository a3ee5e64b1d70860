/**
 * A case told step by step: which thread did what, in order, ending with what broke; as text, and as a trace-event file
 * that Perfetto and Chrome open.
 */
import * as machine from '@ebb/machine';
import type { ScheduleEvent } from '@ebb/machine';
import type { FuzzCase } from './case-file.ts';

const CONTROL_WORDS: ReadonlyMap<number, string> = new Map([
  [machine.VC_MODE, 'mode'],
  [machine.VC_FLUSH_ACK, 'flush acknowledged'],
  [machine.VC_FLUSH_REQ, 'flush request'],
  [machine.VC_IRQ, 'interrupt lines'],
  [machine.VC_EXIT_STATE, 'exit mailbox'],
]);
const RUN_WORDS: ReadonlyMap<number, string> = new Map([
  [machine.RC_DOORBELL, 'doorbell'],
  [machine.RC_HOST_ASLEEP, 'host asleep'],
  [machine.RC_STOP, 'stop'],
]);

/** Names a word that an atomic operation touched. */
function wordName(detail: number): string {
  const region = machine.SHARED_REGIONS[detail >> 24];
  const index = detail & 0xff_ffff;
  switch (region) {
    case 'vcpu-control': {
      const word = index % machine.VCPU_BLOCK_WORDS;
      return `vCPU block ${Math.floor(index / machine.VCPU_BLOCK_WORDS)}: ${CONTROL_WORDS.get(word) ?? `word ${word}`}`;
    }
    case 'run-control':
      return RUN_WORDS.get(index) ?? `run control word ${index}`;
    case 'dram':
      return `frame 0x${(index >> 10).toString(16)} word ${index & 1023}`;
    case 'arena':
    case 'ledger':
    case 'violations':
    case 'tlb':
      return `${region} word ${index}`;
    case undefined:
      return `word ${index}`;
  }
}

/** One event in words. */
export function describeEvent({ point, detail }: ScheduleEvent): string {
  switch (point) {
    case 'load':
      return `loads ${wordName(detail)}`;
    case 'store':
      return `stores ${wordName(detail)}`;
    case 'rmw':
      return `exchanges ${wordName(detail)}`;
    case 'wait':
      return `waits on ${wordName(detail)}`;
    case 'notify':
      return `notifies ${wordName(detail)}`;
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
    lines.push(`  ${String(from + i).padStart(5)}  ${name.padEnd(6)} ${describeEvent(event)}`);
  });
  lines.push('', 'found:', ...found.map((f) => `  ${f}`));
  return `${lines.join('\n')}\n`;
}

/** The same as a trace-event file: one step is a microsecond. */
export function perfetto(
  events: readonly ScheduleEvent[],
  found: readonly string[],
  threads: number,
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
      args: { what: describeEvent(event) },
    });
  });
  for (const what of found)
    traceEvents.push({ name: what, ph: 'i', s: 'g', pid: 1, tid: 0, ts: events.length });
  return `${JSON.stringify({ traceEvents, displayTimeUnit: 'ns' })}\n`;
}
