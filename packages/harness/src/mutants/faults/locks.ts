/** Seeded faults. Locks. */
import { fault, props, test, type Mutant } from '../mutant.ts';

const LOCK = 'packages/machine/src/spin-lock.ts';
const BUDDY = 'packages/guest-kernel/src/mm/buddy.ts';
const PCP = 'packages/guest-kernel/src/mm/per-cpu-pages.ts';
const CACHE = 'packages/guest-kernel/src/mm/page-cache.ts';
const LOCK_ORDER_TEST = test('machine/src/lock-order.test.ts');

const SCHEDULE = 'packages/machine/src/controlled-schedule.ts';
const SCHEDULE_TEST = test('harness/src/fuzz/controlled-schedule.test.ts');

export const LOCKS_FAULTS: readonly Mutant[] = [
  fault(
    'wakes-every-sleeper',
    SCHEDULE,
    'if (w[at + STATE] !== ASLEEP || w[at + SLEEPS_ON] !== id) continue;',
    'if (w[at + STATE] !== ASLEEP) continue;',
    'a wake-up of another word hides a lost one',
    SCHEDULE_TEST,
  ),
  fault(
    'hash-without-words',
    SCHEDULE,
    '    w[HASH] = Math.imul(w[HASH] ^ detail, 0x01000193);\n',
    '',
    'two interleavings count as one',
    SCHEDULE_TEST,
  ),
  fault(
    'no-change-points',
    SCHEDULE,
    'w[CHANGES] = Math.min(start.depth, MAX_CHANGES);',
    'w[CHANGES] = 0;',
    'PCT never preempts',
    SCHEDULE_TEST,
  ),
  fault(
    'spin-is-progress',
    SCHEDULE,
    "  'spin',\n  'wait',\n",
    "  'wait',\n",
    'two that spin for each other are no deadlock',
    SCHEDULE_TEST,
  ),
  fault(
    'lock-not-taken',
    LOCK,
    '  if (Atomics.compareExchange(words, index, 0, holder + 1) === 0) {\n    if (observer !== null) observer.taken(words, index, true);\n    return;\n  }\n',
    '  if (words[index] === 0) return;\n',
    'I19: a lock that excludes nobody',
    props('allocator'),
  ),
  fault(
    'unlock-plain',
    LOCK,
    '  Atomics.store(words, index, 0);\n',
    '  words[index] = 0;\n',
    'memory model: a release that orders nothing',
    props('allocator'),
  ),
  fault(
    'zone-lock-dropped',
    BUDDY,
    '    spinLock(this.w, zone + Z_LOCK, this.vcpu.id, this.#relax);\n  }\n\n  unlock(zone: number): void {\n    spinUnlock(this.w, zone + Z_LOCK);\n',
    '  }\n\n  unlock(_zone: number): void {\n',
    'I19: the zone lock is gone',
    props('allocator'),
  ),
  fault(
    'lease-not-taken',
    PCP,
    'while (Atomics.compareExchange(this.#w, at, LEASE_FREE, LEASE_OWNER) !== LEASE_FREE) this.#relax();',
    'Atomics.store(this.#w, at, LEASE_OWNER);',
    'I19: two CPUs on one per-CPU list',
    props('allocator'),
  ),
  fault(
    'drain-without-lease',
    PCP,
    'if (Atomics.compareExchange(this.#w, base + C_LEASE, LEASE_FREE, LEASE_DRAINER) === LEASE_FREE) {',
    'if (Atomics.load(this.#w, base + C_LEASE) !== LEASE_DRAINER) {',
    'I19: a drain of lists in use',
    props('allocator'),
  ),

  fault(
    'lock-order-turned',
    CACHE,
    '    this.#unhash(pfn);\n    this.#unlock();\n    const node = this.nodeOf(pfn);\n    this.#lru.lock(node);\n    this.#lru.remove(node, pfn);\n    this.#lru.unlock(node);\n    return true;\n',
    '    this.#unhash(pfn);\n    const node = this.nodeOf(pfn);\n    this.#lru.lock(node);\n    this.#unlock();\n    this.#lock();\n    this.#unlock();\n    this.#lru.remove(node, pfn);\n    this.#lru.unlock(node);\n    return true;\n',
    'I23: the page-cache lock inside the LRU lock, and the LRU lock inside it',
    props('cache'),
  ),
  fault(
    'lock-tried-in-two-steps',
    LOCK,
    'if (Atomics.compareExchange(words, index, 0, holder + 1) !== 0) return false;',
    'if (Atomics.load(words, index) !== 0) return false;\n  Atomics.store(words, index, holder + 1);',
    'two holders of one lock',
    LOCK_ORDER_TEST,
  ),
];
