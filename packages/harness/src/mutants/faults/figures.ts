/** Seeded faults. What Ebb says of itself: /proc, traces and how they are replayed, fidelity. */
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

export const FIGURES_FAULTS: readonly Mutant[] = [
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
