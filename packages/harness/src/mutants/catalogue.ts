/**
 * The catalogue of seeded faults. Each is one edit in one place, of the kinds that people make: a lock, a barrier, a
 * publish, an acknowledgement wait, a flush, a zeroing, a bounds check, an isolation step, a notification, a retry.
 */
import { ALLOCATOR_FAULTS } from './faults/allocator.ts';
import { BALLOON_FAULTS } from './faults/balloon.ts';
import { CACHE_FAULTS } from './faults/cache.ts';
import { DESCRIPTOR_FAULTS } from './faults/descriptors.ts';
import { FIGURES_FAULTS } from './faults/figures.ts';
import { HOST_FAULTS } from './faults/host.ts';
import { HOST_MEMORY_FAULTS } from './faults/host-memory.ts';
import { IN_USE_FAULTS } from './faults/in-use.ts';
import { LOCKS_FAULTS } from './faults/locks.ts';
import { MEMORY_DEVICE_FAULTS } from './faults/memory-device.ts';
import { MEMORY_DRIVER_FAULTS } from './faults/memory-driver.ts';
import { PROCESSES_FAULTS } from './faults/processes.ts';
import { QUEUES_FAULTS } from './faults/queues.ts';
import { VCPU_FAULTS } from './faults/vcpu.ts';
import type { Equivalent, Mutant } from './mutant.ts';

export const MUTANTS: readonly Mutant[] = [
  ...HOST_FAULTS,
  ...HOST_MEMORY_FAULTS,
  ...VCPU_FAULTS,
  ...LOCKS_FAULTS,
  ...ALLOCATOR_FAULTS,
  ...BALLOON_FAULTS,
  ...CACHE_FAULTS,
  ...QUEUES_FAULTS,
  ...DESCRIPTOR_FAULTS,
  ...MEMORY_DEVICE_FAULTS,
  ...MEMORY_DRIVER_FAULTS,
  ...PROCESSES_FAULTS,
  ...IN_USE_FAULTS,
  ...FIGURES_FAULTS,
];

export const EQUIVALENT: readonly Equivalent[] = [
  {
    name: 'range-not-covered, in-progress-lost',
    reason:
      'with one mapper per file the lock is held until the flush is over, and detaching and the new sequence follow in the same step: whoever passes the lock sees the sequence moved. With several mappers the range is what protects them',
  },
  {
    name: 'drain-request-unserved',
    reason:
      'a CPU that ignores drain requests between steps still gives its lease back at the end of its slice, and then the drainer empties its lists itself: later, never never',
  },
  {
    name: 'slot-not-invalidated',
    reason:
      'a slot that is removed without being marked invalid first: faults that resolved through it are caught by the range in progress until the flush is over and by the sequence after it, and the removal follows in the same step',
  },
  {
    name: 'reported-flag-kept',
    reason:
      'a block that leaves its list with FREE_REPORTED still set: whatever list it goes back to, its word is stored whole',
  },
  {
    name: 'detach-after-end',
    reason:
      'in MemFile.punchHoles the blocks are detached and the listeners told with no yield between: no task can run in between, and vCPUs resolve nothing themselves',
  },
  {
    name: 'copy-before-shootdown',
    reason:
      'a page that moves is copied after the flush; a copy made before it as well is overwritten by that one, and nobody reads the new page in between',
  },
  {
    name: 'migration-entry-is-empty',
    reason:
      'a fault that takes a migration entry for an empty one allocates a page for nothing: under the page-table lock the entry is not empty, the page is dropped, and the fault is taken again',
  },
  {
    name: 'second-yield-in-fault',
    reason:
      'without the yield between populating and locking, the fault is merely less often interrupted; the retry check under the lock does not depend on it',
  },
];
