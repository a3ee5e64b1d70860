/** Seeded faults. Processes: page tables, copy on write, TLB shootdown, migration. */
import { fault, props, test, type Mutant } from '../mutant.ts';

const PROCESS = 'packages/guest-kernel/src/mm/process.ts';
const SHOOTDOWN = 'packages/guest-kernel/src/mm/shootdown.ts';
const KERNEL = 'packages/guest-kernel/src/kernel.ts';
const GUEST_MMU = 'packages/machine/src/guest-mmu.ts';
const VCPU = 'packages/machine/src/vcpu.ts';

const PROCESSES = props('processes');
const GUEST_MMU_TEST = test('machine/src/guest-mmu.test.ts');
const PROCESS_TEST = test('guest-kernel/src/mm/process.test.ts');
const HOTPLUG_TEST = test('guest-kernel/src/mm/memory-hotplug.test.ts');

export const PROCESSES_FAULTS: readonly Mutant[] = [
  fault(
    'move-without-shootdown',
    PROCESS,
    '    if (entries.length > 0) this.shootdown.flushAll();\n    const moves',
    '    const moves',
    'I22: a store through an old translation is lost with the old page',
    PROCESSES,
  ),
  fault(
    'move-without-content',
    PROCESS,
    '      this.#vcpu.copyPage(gfn(from), gfn(to));\n      const target',
    '      const target',
    'I22: a page moves and its content stays',
    PROCESSES,
  ),
  fault(
    'answer-before-flush',
    SHOOTDOWN,
    '    this.#mmu.flush();\n    Atomics.store(this.#w, at + ANSWERED, requested);',
    '    Atomics.store(this.#w, at + ANSWERED, requested);',
    'a vCPU says that it has forgotten, and has not',
    PROCESS_TEST,
  ),
  fault(
    'shootdown-not-awaited',
    SHOOTDOWN,
    'while (((Atomics.load(w, at + ANSWERED) - want[cpu]) | 0) < 0 && PerCpuPages.inSlice(w, cpu))',
    'while (want[cpu] < 0 && PerCpuPages.inSlice(w, cpu))',
    'nobody waits for the other vCPUs',
    PROCESS_TEST,
  ),
  fault(
    'fork-without-shootdown',
    PROCESS,
    '    if (child >= 0) this.shootdown.flushAll();\n',
    '',
    'the parent goes on storing into pages that the child shares',
    PROCESS_TEST,
  ),
  fault(
    'fork-leaves-writable',
    PROCESS,
    'this.#tables.setFlags(from, low, low & ~PTE_W);',
    'this.#tables.setFlags(from, low, low);',
    'copy on write: the parent stores into shared pages',
    PROCESSES,
  ),
  fault(
    'cow-never-copies',
    PROCESS,
    'if (Atomics.load(w, this.#memmap + (shared << 4) + P_REF) === 1)',
    'if (Atomics.load(w, this.#memmap + (shared << 4) + P_REF) > 0)',
    'copy on write: a shared page is written to',
    PROCESSES,
  ),
  fault(
    'discard-without-shootdown',
    PROCESS,
    '      if (pfn < 0) return;\n      this.shootdown.flushAll();\n',
    '      if (pfn < 0) return;\n',
    'a page is free while a translation reaches it',
    PROCESSES,
  ),
  fault(
    'one-mapper-forgotten',
    PROCESS,
    '    for (let id = 0; id < MAX_PROCESSES; id++) {\n      const slot = this.#slot(id);\n      if (w[slot + X_ALIVE] === 0 || vpn',
    '    for (let id = 1; id < MAX_PROCESSES; id++) {\n      const slot = this.#slot(id);\n      if (w[slot + X_ALIVE] === 0 || vpn',
    'reverse map: memory of one process can never be unplugged',
    PROCESS_TEST,
  ),
  fault(
    'references-unchecked',
    PROCESS,
    'entries.length > 0 && Atomics.load(w, page + P_REF) === entries.length;',
    'entries.length > 0;',
    'I22: a page moves that a device still holds',
    PROCESS_TEST,
  ),
  fault(
    'slice-begins-stale',
    KERNEL,
    '    // What was asked while it was away: before any translation is used.\n    this.parts.processes.shootdown.serve();\n',
    '',
    'a vCPU that was away uses what it was told to forget',
    PROCESS_TEST,
  ),
  fault(
    'guest-ad-blind',
    GUEST_MMU,
    '      if (Atomics.compareExchange(i32, word, low, set) === low) return ptePfn(low, high);',
    '      Atomics.store(i32, word, set);\n      return ptePfn(low, high);',
    'setting A and D revives an entry that was taken away',
    GUEST_MMU_TEST,
  ),
  fault(
    'combined-survives-host-flush',
    VCPU,
    ' || bits >> CM_EPOCH_SHIFT !== this.#epochNumber) return -1;',
    ') return -1;',
    'I17: a combined mapping outlives the flush that the host waited for',
    GUEST_MMU_TEST,
  ),
  fault(
    'combined-survives-guest-flush',
    VCPU,
    '  dropCombined(): void {\n    this.#combined.fill(-1);',
    '  dropCombined(): void {\n    this.#combined.fill(-1, 0, COMBINED_WORDS);',
    'I22: the guest flushes, and all entries but one stay',
    PROCESSES,
  ),
  fault(
    'combined-load-grants-store',
    VCPU,
    '    if (write && (bits & CM_WRITE) === 0) return -1;\n',
    '',
    'a store goes through what only a load has checked',
    GUEST_MMU_TEST,
  ),
  fault(
    'combined-without-space',
    GUEST_MMU,
    'const tag = (asid << ASID_SHIFT) | vpn;',
    'const tag = vpn;',
    'I1: a process reads through the translation of another',
    PROCESSES,
  ),
  fault(
    'process-page-not-zeroed',
    PROCESS,
    '    else this.#vcpu.zeroPages(gfn(pfn), 1);\n',
    '',
    'I1: a process sees what another left',
    PROCESSES,
  ),
  fault(
    'anon-not-movable',
    'packages/guest-kernel/src/mm/memory-hotplug.ts',
    'const named = (flags & PG_ANON) !== 0 || ((flags',
    'const named = ((flags',
    'H16: memory that processes use can never be unplugged',
    HOTPLUG_TEST,
  ),
  fault(
    'cow-not-flushed',
    PROCESS,
    '        this.#tables.clear(entry);\n        this.shootdown.flushAll();\n',
    '        this.#tables.clear(entry);\n',
    'I22: another thread reads the old page after a copy on write',
    PROCESS_TEST,
  ),
  fault(
    'fork-flushes-itself',
    PROCESS,
    '    if (child >= 0) this.shootdown.flushAll();\n',
    '    if (child >= 0) this.mmu.flush();\n',
    'I22: a thread of the parent stores into what the child shares',
    PROCESS_TEST,
  ),
  fault(
    'unused-page-leaks',
    PROCESS,
    '    if (unused >= 0) this.#drop(unused);\n',
    '',
    'I19: a fault that came second keeps its page',
    PROCESS_TEST,
  ),
];
