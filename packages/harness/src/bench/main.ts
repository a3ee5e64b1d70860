/**
 * `npm run bench`: figures as ratios in one run, against our own small C counterpart where a compiler is present.
 * Ebb and C take turns, C before and after each of Ebb's rounds: a line between two cores takes 60 ns in one window of this
 * kind of machine and 330 in the next, so only neighbours are compared. A figure is the median of its rounds, a ratio the
 * median of the rounds' ratios. Writes `out/bench.json`. `--package NAME`: what that package is responsible for.
 */
import { execFileSync, spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import Table from 'cli-table3';
import { Command, Option } from 'commander';
import { allowedCores, onCore } from '../fuzz/cores.ts';
import { inlineFor } from '../run/engine.ts';
import * as cases from './cases.ts';
import { median } from './timed.ts';
import { resizeBalloon, resizeRegion, resizeReporting, type ResizeFigures } from './resize.ts';

const ROUNDS = 5;
/** A round counts if C took about as long after it as before: between them a virtual machine may have moved to other cores. */
const STEADY = 1.5;
/** Tries for each round. */
const ATTEMPTS = 4;

const PACKAGES = ['machine', 'virtio', 'memfs', 'guest-kernel', 'host-kvm', 'harness'] as const;
type Package = (typeof PACKAGES)[number];

const { package: only, load } = new Command('npm run bench --')
  .description('Figures of Ebb as ratios in one run, a table and out/bench.json; about 95 seconds.')
  .addOption(new Option('--package <name>', 'what one package is responsible for').choices(PACKAGES))
  .addOption(new Option('--load', 'load what is measured, and no more').hideHelp())
  .addHelpText('after', '\nExamples:\n  npm run bench\n  npm run bench -- --package virtio')
  .exitOverride(({ exitCode }) => process.exit(exitCode === 0 ? 0 : 2))
  .parse()
  .opts<{ package?: Package; load?: true }>();
if (load === true) {
  // Workers' modules refuse to run in a process that is nobody's worker; they are loaded by then.
  await Promise.allSettled([
    import('./allocator-worker.ts'),
    import('./bare-worker.ts'),
    import('./exit-worker.ts'),
    import('./handover-worker.ts'),
    import('./ring-worker.ts'),
    import('../fuzz/fuzz-worker.ts'),
    import('../run/cpu-worker.ts'),
    import('../run/host-worker.ts'),
  ]);
  process.exit(0);
}
/** Whether the figures of these packages are asked for: all are, unless one is named. */
const wants = (...packages: Package[]): boolean => only === undefined || packages.includes(only);

interface Row {
  readonly name: string;
  readonly unit: string;
  readonly ebb: number;
  readonly other: number | null;
  /** Ebb ÷ its counterpart as speed: 1 is equal, above 1 is faster. For exits and hand-overs: times slower. */
  readonly ratio: number | null;
  /** Lowest and highest ratio of the rounds. */
  readonly range: readonly [number, number] | null;
  readonly target: string;
  readonly met: boolean | null;
}

/** Builds the counterpart: its path, or null without a C compiler. */
function buildTwin(): string | null {
  const source = fileURLToPath(new URL('../../bench/twin.c', import.meta.url));
  const folder = mkdtempSync(join(tmpdir(), 'ebb-bench-'));
  process.on('exit', () => rmSync(folder, { recursive: true }));
  const out = join(folder, 'twin');
  for (const cc of ['cc', 'gcc', 'clang']) {
    const built = spawnSync(cc, ['-O2', '-pthread', '-o', out, source], { encoding: 'utf8' });
    if (built.status === 0) return out;
  }
  return null;
}

inlineFor('long');

/** What a program prints, as a number. */
function measured(command: string, ...args: string[]): number {
  return Number(execFileSync(command, args, { encoding: 'utf8' }));
}

const twinPath = cases.ARCH === 'x64' ? buildTwin() : null;
const twin = twinPath === null ? null : (...args: string[]): number => measured(twinPath, ...args);
if (twin === null) process.stderr.write('no C compiler (or not x86-64): Ebb ÷ C is left out\n');
const rows: Row[] = [];

/** A figure without a counterpart in C; `met`: whether it is what `target` says. */
function figure(name: string, unit: string, ebb: number, target = '', met: boolean | null = null): void {
  rows.push({ name, unit, ebb, other: null, ratio: null, range: null, target, met });
}

/** `rate`: more is better. `time`: less is, and the ratio still one of speeds. `slower`: a time, and the ratio one of times. */
async function pair(
  name: string,
  unit: string,
  kind: 'rate' | 'time' | 'slower',
  ebb: () => number | Promise<number>,
  c: (() => number) | null,
  target: number | null,
  rounds = ROUNDS,
): Promise<void> {
  const ours: number[] = [];
  const theirs: number[] = [];
  const ratios: number[] = [];
  // Warm: V8 compiles what runs for long again, with what it has learnt.
  await ebb();
  let before = c?.() ?? 0;
  for (let left = ATTEMPTS * rounds; left > 0 && ours.length < rounds; left--) {
    const mine = await ebb();
    if (c === null) {
      ours.push(mine);
      continue;
    }
    const after = c();
    const steady = Math.max(before, after) <= STEADY * Math.min(before, after);
    const other = Math.sqrt(before * after);
    before = after;
    // The last is taken as it is, if no other was.
    if (!steady && (left > 1 || ours.length > 0)) continue;
    ours.push(mine);
    theirs.push(other);
    ratios.push(kind === 'time' ? other / mine : mine / other);
  }
  const ratio = ratios.length === 0 ? null : median(ratios);
  const sign = kind === 'slower' ? '≤' : '≥';
  rows.push({
    name,
    unit,
    ebb: median(ours),
    other: theirs.length === 0 ? null : median(theirs),
    ratio,
    range: ratio === null ? null : [Math.min(...ratios), Math.max(...ratios)],
    target: target === null ? '' : `${sign} ${target}`,
    met: ratio === null || target === null ? null : kind === 'slower' ? ratio <= target : ratio >= target,
  });
  process.stderr.write(
    `${name}: ${median(ours).toFixed(2)} ${unit}${ratio === null ? '' : `, ${ratio.toFixed(2)} of C`}\n`,
  );
}

const c = (...args: string[]): (() => number) | null => (twin === null ? null : () => twin(...args));

if (wants('virtio'))
  for (const [name, rate, target] of [
    ['split queue, batch 64', () => cases.ring(64, 'singles', 8_000_000), 0.5],
    ['split queue, indirect chains of 3, validated', () => cases.ring(64, 'chains', 6_000_000), 0.25],
    ['the same, popped and returned one by one', () => cases.ring(64, 'one by one', 1_500_000), null],
    ['split ring, bare JavaScript (no checks)', () => cases.bare('ring'), null],
  ] as const)
    await pair(name, 'M buffers/s', 'rate', rate, c('ring', '64'), target);
if (wants('guest-kernel'))
  for (const what of ['bulk', 'random', 'mixed'] as const) {
    const ebb = (): number => cases.buddy(what);
    await pair(`buddy, ${what}`, 'ns/op', 'time', ebb, c('buddy', what), 0.35);
    await pair(
      `buddy, ${what}, C block by block as Linux`,
      'ns/op',
      'time',
      ebb,
      c('buddy', what, 'pages'),
      null,
    );
    await pair(
      `buddy, ${what}, two vCPUs at once, threads`,
      'ns/op',
      'time',
      () => cases.buddyOnTwo(what),
      c('buddy', what, 'two'),
      null,
    );
  }
if (wants('machine'))
  await pair(
    'two words in turn, bare JavaScript (times slower than C spin)',
    'ns',
    'slower',
    () => cases.bare('words'),
    c('pingpong'),
    null,
  );
if (wants('host-kvm', 'memfs'))
  await pair('demand-zero fault, inline', 'ns', 'time', cases.demandZero, c('fault'), 0.5);

if (wants('machine')) {
  const runs: cases.AccessFigures[] = [];
  cases.access();
  for (let round = 0; round < ROUNDS; round++) runs.push(cases.access());
  for (const [key, name, target] of [
    ['runs', 'vCPU sequential by page runs ÷ raw array', 0.7],
    ['word', 'vCPU word store, sequential ÷ raw array', 0.15],
    ['random', 'vCPU word store, random over 1 GiB ÷ raw array', 0.5],
    ['copy', 'bulk copy by guest-physical address ÷ raw set', 0.7],
  ] as const) {
    const ratios = runs.map((r) => r[key]);
    const ratio = median(ratios);
    rows.push({
      name,
      unit: 'ratio',
      ebb: ratio,
      other: null,
      ratio,
      range: [Math.min(...ratios), Math.max(...ratios)],
      target: `≥ ${target}`,
      met: ratio >= target,
    });
    process.stderr.write(`${name}: ${ratio.toFixed(2)}\n`);
  }
}

if (wants('machine', 'host-kvm')) {
  const exit = (): Promise<number> => cases.exitThreads(200_000, false);
  // A round is short, less than what disturbs it lasts, and V8 compiles differently from one to the next.
  const name = 'exit round trip, threads (times slower than C spin)';
  await pair(name, 'ns', 'slower', exit, c('pingpong'), 2, 5 * ROUNDS);
  figure('exit, inline', 'ns', cases.exitInline(300_000));
  figure('demand fault, threads', 'ns', await cases.exitThreads(60_000, true));
}
if (wants('harness'))
  for (const schedule of ['threads', 'inline'] as const) {
    const rate = await cases.replay(schedule);
    figure(`trace replay, two vCPUs, ledger on, ${schedule}`, 'M events/s', rate, '≥ 1', rate >= 1);
    process.stderr.write(`replay ${schedule}: ${rate.toFixed(2)} M events/s\n`);
  }

if (wants('host-kvm', 'guest-kernel', 'memfs')) {
  const line = (name: string, f: ResizeFigures, balloon: ResizeFigures): void => {
    const add = (what: string, unit: string, ebb: number, other: number | null = null): void => {
      const ratio = other === null ? null : ebb / other;
      rows.push({ name: `${name}: ${what}`, unit, ebb, other, ratio, range: null, target: '', met: null });
    };
    add('give 1 GiB ÷ balloon', 'GiB/s', f.grow, balloon.grow);
    add('take it back ÷ balloon', 'GiB/s', f.shrink, balloon.shrink);
    if (f.shrinkVirtual > 0) add('take it back, virtual', 's/GiB', f.shrinkVirtual);
    add('requests', '/GiB', f.requestsPerGiB);
    if (f.firstByteMs > 0) add('first byte usable, virtual', 'ms', f.firstByteMs);
    if (f.left > 0) add('could not be taken back', 'GiB', f.left);
    process.stderr.write(`${name}: ${f.grow.toFixed(2)} GiB/s in, ${f.shrink.toFixed(2)} GiB/s out\n`);
  };
  resizeRegion('idle', true, 2);
  for (const vcpus of [1, 2])
    for (const zeroes of [true, false]) {
      const how = `${vcpus} vCPU${vcpus > 1 ? 's' : ''}, init_on_alloc=${zeroes ? 1 : 0}`;
      const balloon = resizeBalloon(zeroes, vcpus);
      line(`balloon, ${how}`, balloon, balloon);
      line(`reporting, ${how}`, resizeReporting(zeroes, vcpus), balloon);
      for (const use of ['idle', 'half used', 'fragmented'] as const)
        line(`virtio-mem, ${use}, ${how}`, resizeRegion(use, zeroes, vcpus), balloon);
    }
}

if (wants('machine', 'harness')) {
  const point = cases.pointCost();
  figure('controlled schedule: a point without a switch', 'ns', point, '≤ 300', point <= 300);
  // On one core, both sides alike, where the platform can pin.
  const [core] = allowedCores();
  const pinned = (...command: string[]): number => {
    const [program, ...args] = [...onCore(core), ...command];
    return measured(program, ...args);
  };
  const script = fileURLToPath(new URL('./handover.ts', import.meta.url));
  if (core !== undefined) {
    const mine = pinned(process.execPath, '--conditions=ebb-source', script);
    const other = twinPath === null ? null : pinned(twinPath, 'futex');
    rows.push({
      name: 'controlled schedule: a hand-over, one core (times slower than a C futex)',
      unit: 'ns',
      ebb: mine,
      other,
      ratio: other === null ? null : mine / other,
      range: null,
      target: '≤ 1.5',
      met: other === null ? null : mine / other <= 1.5,
    });
  }
}
// Two vCPUs and no device; one vCPU and a device. As `ebb fuzz` runs.
inlineFor('short');
if (wants('harness'))
  for (const property of ['invalidation', 'queue'] as const)
    for (const strategy of ['random', 'pct'] as const) {
      const { perSecond, points, pointsPerSecond } = await cases.executions(property, strategy);
      const target = strategy === 'random' ? 300 : 2000;
      const name = `controlled executions, ${property}: ${points.toFixed(0)} points each, ${strategy}, all cores`;
      figure(name, '/s', perSecond, `≥ ${target} (of 200 points)`, pointsPerSecond >= 200 * target);
      process.stderr.write(`controlled, ${property}, ${strategy}: ${perSecond.toFixed(0)} executions/s\n`);
    }

const table = new Table({
  head: ['benchmark', 'Ebb', 'C', 'unit', 'ratio', 'of the rounds', 'first step', ''],
  style: { head: [], border: [] },
});
for (const r of rows) {
  table.push([
    r.name,
    r.ebb.toFixed(2),
    r.other?.toFixed(2) ?? '',
    r.unit,
    r.ratio?.toFixed(2) ?? '',
    r.range?.map((x) => x.toFixed(2)).join(' – ') ?? '',
    r.target,
    r.met === null ? '' : r.met ? 'met' : 'MISSED',
  ]);
}
process.stdout.write(`${table.toString()}\n`);
mkdirSync('out', { recursive: true });
writeFileSync('out/bench.json', `${JSON.stringify({ schema: 1, node: process.version, rows }, null, 2)}\n`);
process.stdout.write('out/bench.json\n');
