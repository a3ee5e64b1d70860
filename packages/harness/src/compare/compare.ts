/**
 * `ebb compare`: how many VMs with this trace fit on this host, under each technique (rows L1–L9).
 *
 * For one seed: guests start one by one on one host until the run fails; then runs of exactly N, downward, until one
 * succeeds. That N is the count. `vmsFit` is the median over the seeds; the other figures are the median run's.
 */
import {
  VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
  VIRTIO_BALLOON_F_REPORTING,
  VIRTIO_BALLOON_F_STATS_VQ,
} from '@ebb/virtio/uapi';
import { COST_TABLE, costTableHash, GiB, HUGE_PAGES, MiB, NS_PER_S, PAGE_SIZE, Prng } from '@ebb/machine';
import { LINUX_HOTPLUG, type GuestConfig, type HotplugConfig } from '@ebb/guest-kernel';
import { hostBuffers, runBuffers, type HostBuffers } from '../run/buffers.ts';
import { fileStorage } from '../run/file-storage.ts';
import { guestOf, REPLAY_DISK_BYTES } from '../run/guest-of.ts';
import type { RunResult } from '../run/run-result.ts';
import { runInline } from '../run/inline-run.ts';
import { runThreads, ThreadPool, workersFor } from '../run/threads-run.ts';
import type { MemoryDeviceSpec, RunSpec, Technique, VmSpec } from '../run/spec.ts';
import { makePlan, type ReplayPlan } from '../trace/replay-plan.ts';
import { EBB_VERSION } from '../version.ts';
import type { CompareOptions } from './options.ts';
import type { CompareJson } from './schema.ts';

export interface CompareProgress {
  readonly technique: Technique;
  readonly seed: number;
  readonly vms: number;
  readonly exact: boolean;
  readonly nowNs: number;
  readonly hostUsedBytes: number;
  readonly finished: number;
}

/** What one technique's median run looked like, for the report. */
export interface TechniqueRun {
  readonly technique: Technique;
  readonly vmsFit: number;
  readonly result: RunResult;
}

export interface CompareOutcome {
  readonly json: CompareJson;
  readonly runs: readonly TechniqueRun[];
  /** How many had to fit (`--vms`); undefined: they were counted. */
  readonly vms: number | undefined;
  /** Lines for people: violations, and why a `--vms` run failed. */
  readonly notes: readonly string[];
  readonly deviceTrace: readonly string[];
  readonly allocTrace: readonly string[];
}

/** Whether the VMs that had to fit did, whatever the seed. */
export function verdict([least, most]: readonly [number, number]): string {
  return least > 0 ? 'yes' : most === 0 ? 'no' : 'with some seeds';
}

/** What counting reads of a run. */
export interface Attempt {
  readonly ok: boolean;
  readonly why: string;
  readonly vms: readonly { readonly state: string }[];
}

interface SeedRun<R extends Attempt> {
  readonly seed: number;
  readonly count: number;
  readonly result: R;
  readonly ok: boolean;
}

/** Without re-access in the trace these figures are lower bounds of what the technique would cost or give. */
const LOWER_BOUNDS: Record<Technique, string[]> = {
  none: [],
  balloon: ['stallVirtualNs', 'eptViolations', 'descriptors'],
  reporting: [],
  'virtio-mem': ['stallVirtualNs', 'returnedBytes'],
};

/**
 * A lane runs one machine at a time: its own host memory and threads. On a small trace one machine keeps little more than
 * one core busy, so two lanes share the work of a comparison where host memory allows.
 */
class Lane {
  readonly host: HostBuffers;
  readonly pool: ThreadPool | null;

  constructor(options: CompareOptions) {
    this.host = hostBuffers(options.hostMemory);
    this.pool = options.schedule === 'threads' ? new ThreadPool(workersFor(options.vcpus)) : null;
  }
}

/** Host memory of all lanes together stays below this. */
const LANE_BYTES: number = 4.5 * GiB;

interface Job {
  readonly technique: Technique;
  readonly seed: number;
}

export async function compare(
  options: CompareOptions,
  onProgress: (p: CompareProgress) => void,
  traceOut: boolean,
): Promise<CompareOutcome> {
  const plan = makePlan(options.trace, options.vcpus);
  const seeds = Array.from({ length: options.repeat }, (_, i) => options.seed + i);
  const jobs: Job[] = options.techniques.flatMap((technique) => seeds.map((seed) => ({ technique, seed })));
  const nrLanes =
    options.schedule === 'threads' && jobs.length > 1 && 2 * options.hostMemory <= LANE_BYTES && !traceOut
      ? 2
      : 1;
  const lanes = Array.from({ length: nrLanes }, () => new Lane(options));
  const done = new Map<string, SeedRun<RunResult> & { readonly wallMs: number }>();
  const notes = Object.entries(plan.dropped).map(([why, n]) => `not applied: ${n} × ${why}`);
  let deviceTrace: readonly string[] = [];
  let allocTrace: readonly string[] = [];
  const runJob = async ({ technique, seed }: Job, lane: Lane): Promise<void> => {
    const began = performance.now();
    const run = await countFor(options, seed, async (vms, exact) => {
      const spec = specOf(options, plan, technique, vms, seed, traceOut);
      const { result, alloc } = await execute(
        spec,
        lane.host,
        lane.pool,
        (nowNs, hostUsedBytes, up, finished) =>
          onProgress({ technique, seed, vms: up, exact, nowNs, hostUsedBytes, finished }),
      );
      if (traceOut) {
        ({ deviceTrace } = result);
        allocTrace = alloc;
      }
      if (result.ledgerViolations > 0)
        notes.push(...result.violations.map((v) => `${technique}, seed ${seed}: ${v}`));
      return result;
    });
    if (options.vms !== undefined && !run.ok) notes.push(`${technique}, seed ${seed}: ${run.result.why}`);
    done.set(`${technique}/${seed}`, { ...run, wallMs: performance.now() - began });
  };
  try {
    const waiting = [...jobs];
    const work = async (lane: Lane): Promise<void> => {
      for (let job = waiting.shift(); job !== undefined; job = waiting.shift()) await runJob(job, lane);
    };
    await Promise.all(lanes.map(work));
  } finally {
    await Promise.all(lanes.map(async (lane) => lane.pool?.close()));
  }
  const runs: TechniqueRun[] = [];
  const results: CompareJson['results'] = [];
  for (const technique of options.techniques) {
    const ordered = seeds
      .flatMap((seed) => done.get(`${technique}/${seed}`) ?? [])
      .toSorted((a, b) => a.count - b.count);
    const median = ordered[Math.floor((ordered.length - 1) / 2)];
    const wallMs = Math.round(ordered.reduce((sum, run) => sum + run.wallMs, 0));
    runs.push({ technique, vmsFit: median.count, result: median.result });
    results.push(row(technique, median, [ordered[0].count, ordered[ordered.length - 1].count], wallMs));
  }
  const json: CompareJson = {
    schema: 1,
    ebb: EBB_VERSION,
    schedule: options.schedule,
    costTable: costTableHash(COST_TABLE),
    backing: options.backing === '4k' ? '4k' : 'thp',
    hugePages: options.backing === '4k' ? 'never' : 'always',
    trace: {
      name: options.trace.name,
      hash: options.trace.hash,
      events: plan.count,
      guestMemoryBytes: options.guestMemory,
    },
    host: { memoryBytes: options.hostMemory, cpus: workersFor(options.vcpus) },
    seeds,
    results,
  };
  return { json, runs, vms: options.vms, notes, deviceTrace, allocTrace };
}

/** The count for one seed, with the run it stands for. */
export async function countFor<R extends Attempt>(
  options: Pick<CompareOptions, 'vms' | 'maxVms'>,
  seed: number,
  run: (vms: number, exact: boolean) => Promise<R>,
): Promise<SeedRun<R>> {
  if (options.vms !== undefined) {
    const result = await run(options.vms, true);
    return { seed, count: result.ok ? options.vms : 0, result, ok: result.ok };
  }
  const open = await run(options.maxVms, false);
  if (open.ok) return { seed, count: options.maxVms, result: open, ok: true };
  // The VM that was being started when the run failed is one too many, and maybe more are.
  let last = open;
  for (let n = Math.max(0, started(open) - 1); n > 0; n--) {
    last = await run(n, true);
    if (last.ok) return { seed, count: n, result: last, ok: true };
  }
  return { seed, count: 0, result: last, ok: false };
}

/** VMs that had been started when a run ended; one whose start itself failed counts. */
function started(result: Attempt): number {
  const on = result.vms.filter((vm) => vm.state !== 'off').length;
  return /has no memory to start/.test(result.why) ? on + 1 : on;
}

function specOf(
  options: CompareOptions,
  plan: ReplayPlan,
  technique: Technique,
  vms: number,
  seed: number,
  traceOut: boolean,
): RunSpec {
  const guest = guestOf(options.trace, {
    guestMemoryBytes: options.guestMemory,
    vcpus: options.vcpus,
    balloon: technique !== 'none',
  });
  const region = technique === 'virtio-mem' ? upperMemory(guest) : null;
  const random = new Prng(seed);
  const vm = (k: number): VmSpec => ({
    // VM k boots at k · stagger plus a seeded jitter of at most one stagger.
    bootAtNs: Math.round(k * options.staggerNs + random.unit() * options.staggerNs),
    guest: region === null ? guest : { ...guest, hotplug: REGION_HOTPLUG },
    program: { kind: 'replay', plan },
    diskBytes: REPLAY_DISK_BYTES,
    ...(technique === 'reporting' ? { balloonFeatures: [VIRTIO_BALLOON_F_REPORTING] } : {}),
    ...(technique === 'balloon'
      ? {
          balloonFeatures: [VIRTIO_BALLOON_F_STATS_VQ, VIRTIO_BALLOON_F_DEFLATE_ON_OOM],
          policySets: 'balloon',
        }
      : {}),
    ...(region === null
      ? {}
      : {
          memoryDevices: [region],
          balloonFeatures: [VIRTIO_BALLOON_F_STATS_VQ],
          policySets: 'memory-device',
        }),
  });
  return {
    hostFrames: options.hostMemory / PAGE_SIZE,
    backing: options.backing,
    vms: Array.from({ length: vms }, (_, k) => vm(k)).toSorted((a, b) => a.bootAtNs - b.bootAtNs),
    vcpusPerVm: options.vcpus,
    workers: workersFor(options.vcpus),
    sampleNs: NS_PER_S,
    graceNs: 10 * NS_PER_S,
    traceOut,
    poison: 'edges',
  };
}

/**
 * A capture's memory is no multiple of Linux's 128 MiB blocks, and was all there at boot: what lies above the first part
 * becomes a memory device's region that is plugged from the start, and goes and comes by 2 MiB, as sub-blocks do.
 */
const REGION_HOTPLUG: HotplugConfig = {
  ...LINUX_HOTPLUG,
  devices: 1,
  sectionPages: HUGE_PAGES,
  adopts: 'in-place',
};
/** What no memory device can take: boot memory (H26). */
const BOOT_BYTES: number = 64 * MiB;

function upperMemory(guest: GuestConfig): MemoryDeviceSpec {
  const regionBytes = Math.floor((guest.maxPfn * PAGE_SIZE - BOOT_BYTES) / (2 * MiB)) * 2 * MiB;
  return {
    id: 'vm0',
    addr: BOOT_BYTES,
    regionBytes,
    blockBytes: 2 * MiB,
    node: 0,
    requestedBytes: regionBytes,
    pluggedBytes: regionBytes,
    grants: 'all',
    profile: 'qemu',
  };
}

async function execute(
  spec: RunSpec,
  host: HostBuffers,
  pool: ThreadPool | null,
  onProgress: (nowNs: number, hostUsedBytes: number, vms: number, finished: number) => void,
): Promise<{ result: RunResult; alloc: string[] }> {
  const buffers = runBuffers(spec, host);
  if (pool !== null) {
    const { result, allocTrace } = await runThreads(spec, buffers, pool, (p) =>
      onProgress(p.nowNs, p.hostUsedBytes, p.vms, p.finished),
    );
    return { result, alloc: allocTrace.map((e) => e.line) };
  }
  const disks: { close(): void }[] = [];
  let last = performance.now();
  const { result, allocTrace } = runInline(
    spec,
    buffers,
    (_vm, bytes) => {
      const disk = fileStorage(bytes);
      disks.push(disk);
      return disk;
    },
    (nowNs, side) => {
      if (performance.now() - last < 200) return;
      last = performance.now();
      onProgress(nowNs, side.pool.used * PAGE_SIZE, side.vms.length, side.nrFinished);
    },
  );
  for (const disk of disks) disk.close();
  return { result, alloc: allocTrace.map((e) => e.line) };
}

function row(
  technique: Technique,
  run: SeedRun<RunResult>,
  range: [number, number],
  wallMs: number,
): CompareJson['results'][number] {
  const { result } = run;
  const sum = (pick: (vm: RunResult['vms'][number]) => number): number =>
    result.vms.reduce((total, vm) => total + pick(vm), 0);
  return {
    technique,
    vmsFit: run.count,
    vmsFitRange: range,
    hostPeakBytes: result.hostPeakBytes,
    hostEndBytes: result.hostEndBytes,
    guestFreeEndBytes: sum((vm) => vm.guestFreeBytes),
    returnedBytes: sum((vm) => vm.returnedBytes),
    eptViolations: sum((vm) => vm.eptViolations),
    tlbFlushes: sum((vm) => vm.tlbFlushes),
    kicks: sum((vm) => vm.kicks),
    descriptors: sum((vm) => vm.descriptors),
    stallVirtualNs: result.stall,
    ledgerViolations: result.ledgerViolations,
    events: sum((vm) => vm.events),
    lowerBounds: LOWER_BOUNDS[technique],
    wallMs,
    failure: result.why,
  };
}
