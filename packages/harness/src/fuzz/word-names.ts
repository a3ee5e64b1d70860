/** What the code calls the shared words that findings and stories are about. */
import * as kernel from '@ebb/guest-kernel';
import * as machine from '@ebb/machine';
import type { SharedRegion } from '@ebb/machine';

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

/** The fields of a record of the guest kernel's, by word: its constants that begin with `prefix`. */
function fields(prefix: string): readonly (readonly [name: string, word: number])[] {
  return Object.entries(kernel)
    .filter((entry): entry is [string, number] => entry[0].startsWith(prefix) && typeof entry[1] === 'number')
    .sort((a, b) => a[1] - b[1]);
}

const HEADER = fields('H_');
const ZONE = fields('Z_');
const LRU = fields('L_');
const THREADS = fields('T_');
const PAGE = fields('P_');

/** The field a word belongs to: the last that begins at or before it. */
function field(names: ReturnType<typeof fields>, word: number): string {
  const last = names.findLast(([, at]) => at <= word);
  if (last === undefined) return `word ${word}`;
  return last[1] === word ? last[0] : `${last[0]} + ${word - last[1]}`;
}

/** Runs of equal records in the arena: where they begin, words of each, how many, and what one of its words is called. */
type Records = readonly [
  base: number,
  words: number,
  count: number,
  name: (record: number, word: number) => string,
];

/** One run of words, told by the fields that begin in it. */
const run = (names: ReturnType<typeof fields>, from: number, to: number): Records => [
  from,
  to - from,
  1,
  (_, w) => field(names, from + w),
];

const page = (pfn: number): string => `page 0x${pfn.toString(16)}`;

function arenaRecords(maxPfn: number): readonly Records[] {
  const at = kernel.arenaLayout(maxPfn);
  const blocks = (at.plugged - at.sections) / kernel.SECTION_WORDS;
  return [
    run(HEADER, 0, kernel.ZONE_BASE),
    [kernel.ZONE_BASE, kernel.ZONE_WORDS, kernel.MAX_ZONES, (z, w) => `zone ${z}, ${field(ZONE, w)}`],
    [
      kernel.PCP_BASE,
      kernel.PCP_WORDS,
      kernel.MAX_ZONES * kernel.MAX_CPUS,
      (n, w) => `lists of vCPU ${n % kernel.MAX_CPUS} for zone ${Math.floor(n / kernel.MAX_CPUS)}, word ${w}`,
    ],
    [kernel.LRU_BASE, kernel.LRU_WORDS, kernel.MAX_NODES, (n, w) => `LRU of node ${n}, ${field(LRU, w)}`],
    run(THREADS, kernel.T_BALLOON, kernel.GROUP_BASE),
    [kernel.GROUP_BASE, kernel.GROUP_WORDS, kernel.NR_GROUPS, (n, w) => `memory group ${n}, word ${w}`],
    run(THREADS, kernel.T_ACPI, kernel.PROCESS_BASE),
    [kernel.PROCESS_BASE, kernel.PROCESS_WORDS, kernel.MAX_PROCESSES, (n, w) => `process ${n}, word ${w}`],
    [
      kernel.SHOOTDOWN_BASE,
      kernel.SHOOTDOWN_WORDS,
      kernel.MAX_CPUS,
      (n, w) => `shootdowns of vCPU ${n}, word ${w}`,
    ],
    [kernel.EVENTS_BASE, kernel.EVENTS_WORDS, kernel.MAX_CPUS, (n, w) => `counters of vCPU ${n}, word ${w}`],
    [kernel.CPU_BASE, kernel.CPU_WORDS, kernel.MAX_CPUS, (n, w) => `own words of vCPU ${n}, word ${w}`],
    [at.queues, kernel.QUEUE_WORDS, kernel.NR_QUEUES, (n, w) => `driver of queue ${n}, word ${w}`],
    [at.pageblocks, 1, at.memmap - at.pageblocks, (n) => `type of pageblock ${n}`],
    [at.memmap, kernel.PAGE_STRUCT_WORDS, maxPfn, (n, w) => `${page(n)}, ${field(PAGE, w)}`],
    [at.hash, 1, at.hashBuckets, (n) => `bucket ${n} of the page cache`],
    [at.shadow, 1, maxPfn, (n) => `${page(n)}, shadow`],
    [at.free, 1, maxPfn, (n) => `${page(n)}, free block`],
    [at.sections, kernel.SECTION_WORDS, blocks, (n, w) => `memory block ${n}, word ${w}`],
    [at.plugged, 1, at.words - at.plugged, (n) => `plugged bits, word ${n}`],
  ];
}

/** Word `word` of a region, in a run whose guests have `maxPfn` pages. */
export function wordName(region: SharedRegion, word: number, maxPfn: number): string {
  switch (region) {
    case 'vcpu-control': {
      const at = word % machine.VCPU_BLOCK_WORDS;
      return `vCPU block ${Math.floor(word / machine.VCPU_BLOCK_WORDS)}: ${CONTROL_WORDS.get(at) ?? `word ${at}`}`;
    }
    case 'run-control':
      return RUN_WORDS.get(word) ?? `run control word ${word}`;
    case 'dram':
      return `frame 0x${(word >> 10).toString(16)} word ${word & 1023}`;
    case 'arena': {
      for (const [base, words, count, name] of arenaRecords(maxPfn))
        if (word >= base && word < base + words * count)
          return name(Math.floor((word - base) / words), (word - base) % words);
      return `arena word ${word}`;
    }
    case 'ledger':
    case 'violations':
    case 'tlb':
      return `${region} word ${word}`;
  }
}
