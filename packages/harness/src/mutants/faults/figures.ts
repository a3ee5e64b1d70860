/** Seeded faults. What Ebb says of itself: /proc, traces and how they are replayed, fidelity, what a search tries. */
import { fault, test, type Mutant } from '../mutant.ts';

const PROCFS = 'packages/guest-kernel/src/procfs.ts';
const PROCFS_TEST = test('guest-kernel/src/procfs.test.ts');
const FIDELITY = 'packages/harness/src/fidelity.ts';
const FIDELITY_TEST = test('harness/src/fidelity.test.ts');
const MEMORY_FIDELITY = 'packages/harness/src/memory-device/fidelity.ts';
const MEMORY_FIDELITY_TEST = test('harness/src/memory-device/fidelity.test.ts');
const IMPORT = 'packages/harness/src/trace/import.ts';
const IMPORT_TEST = test('harness/src/trace/import.test.ts');
const CAPTURE = 'packages/harness/src/trace/capture.ts';
const CAPTURE_TEST = test('harness/src/trace/capture.test.ts');
const REPLAY_PROGRAM = 'packages/harness/src/run/replay-program.ts';
const REPLAY_PROGRAM_TEST = test('harness/src/run/replay-program.test.ts');
const COMPARE = 'packages/harness/src/compare/compare.ts';
const COMPARE_TEST = test('harness/src/compare/compare.test.ts');
const EXPLORE = 'packages/harness/src/fuzz/explore.ts';
const FUZZ_TEST = test('harness/src/fuzz/fuzz.test.ts');

export const FIGURES_FAULTS: readonly Mutant[] = [
  fault(
    'sixteen-programs',
    EXPLORE,
    'seed: Math.imul(this.#options.seed, 0x01000193) ^ batch,',
    'seed: Math.imul(this.#options.seed, 0x01000193),',
    'a search tries the same programs for ever',
    FUZZ_TEST,
  ),
  fault(
    'races-never-looked-for',
    EXPLORE,
    'observe: n % 4 === OBSERVED_RUN,',
    'observe: n % 4 === 4,',
    'I20: no run looks for races',
    FUZZ_TEST,
  ),
  fault(
    'count-skips-one',
    COMPARE,
    'Math.max(0, started(open) - 1)',
    'Math.max(0, started(open) - 2)',
    'L1: one VM fewer than fits',
    COMPARE_TEST,
  ),
  fault(
    'count-forgets-who-could-not-start',
    COMPARE,
    '? on + 1 : on;',
    '? on : on;',
    'L1: one VM fewer than fits, where the next finds no memory to start',
    COMPARE_TEST,
  ),
  fault(
    'ordinal-of-a-byte',
    'packages/harness/src/trace/replay-plan.ts',
    'plan.ordinal[row] = handle.ordinal++;',
    'plan.ordinal[row] = handle.ordinal < 255 ? handle.ordinal++ : 255;',
    'a page with more than 256 events on two CPUs stops a replay',
    IMPORT_TEST,
  ),
  fault(
    'hours-lost',
    'packages/harness/src/trace/ebbtrace.ts',
    'const wide = ',
    'const wide = false && ',
    'time between two events wraps at 2147 s',
    IMPORT_TEST,
  ),
  fault(
    'contents-not-held-against-their-hash',
    'packages/harness/src/trace/ebbtrace.ts',
    'if (traceHash(trace) !== trace.hash)',
    'if (trace.hash.length > 99)',
    'an .ebbtrace of anything is replayed under the name of something',
    IMPORT_TEST,
  ),
  fault(
    'checker-forgets-no-reset',
    'packages/harness/src/protocol/check-trace.ts',
    '      this.#balloon.reset();\n',
    '',
    'ebb check: a breach where a device was reset',
    test('harness/src/protocol/check-trace.test.ts'),
  ),
  fault(
    'lru-of-node-0',
    PROCFS,
    'return arena.w[LRU_BASE + list + 2] + arena.w[LRU_BASE + LRU_WORDS + list + 2];',
    'return arena.w[LRU_BASE + list + 2];',
    'meminfo leaves a node out',
    PROCFS_TEST,
  ),
  fault(
    'last-pageblock-uncounted',
    PROCFS,
    'const last = (w[z + Z_END] - 1) >> PAGEBLOCK_ORDER;',
    'const last = (w[z + Z_END] >> PAGEBLOCK_ORDER) - 1;',
    'pagetypeinfo leaves a part of a block out',
    PROCFS_TEST,
  ),
  fault(
    'fidelity-one-sided',
    FIDELITY,
    'Math.abs(ebb - real) / Math.max(1, real)',
    '(ebb - real) / Math.max(1, real)',
    'too few pages agree',
    FIDELITY_TEST,
  ),
  fault(
    'fidelity-of-the-shorter',
    MEMORY_FIDELITY,
    'Math.max(d.requests.ebb, d.requests.real), 0)',
    'Math.min(d.requests.ebb, d.requests.real), 0)',
    'requests that only one side makes do not count',
    MEMORY_FIDELITY_TEST,
  ),
  fault(
    'start-knows-what-was-before',
    IMPORT,
    '        onPcp.clear();\n',
    '',
    'pages in use at the start are free',
    IMPORT_TEST,
  ),
  fault(
    'map-rounded-out',
    CAPTURE,
    'Math.floor((Number(match[2]) + 1) / 4096)',
    'Math.ceil((Number(match[2]) + 1) / 4096)',
    'a page that is partly RAM is RAM',
    CAPTURE_TEST,
  ),
  fault(
    'huge-page-of-one-vcpu',
    REPLAY_PROGRAM,
    '    if (handle <= FIRST_SMALL) {',
    '    if (handle < FIRST_SMALL - (1 << 30)) {',
    'a huge page made of small ones is never freed',
    REPLAY_PROGRAM_TEST,
  ),
];
