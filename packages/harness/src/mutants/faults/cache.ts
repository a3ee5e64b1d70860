/** Seeded faults. Page cache, write-back and the disk they go to. */
import { fault, props, test, type Mutant } from '../mutant.ts';

const CACHE = 'packages/guest-kernel/src/mm/page-cache.ts';
const CACHE_TEST = test('guest-kernel/src/mm/page-cache.test.ts');
const RECLAIM = 'packages/guest-kernel/src/mm/reclaim.ts';
const RECLAIM_TEST = test('guest-kernel/src/mm/reclaim.test.ts');
const HOTPLUG_TEST = test('guest-kernel/src/mm/memory-hotplug.test.ts');
const BLK = 'packages/guest-kernel/src/drivers/blk.ts';
const BLK_TEST = test('guest-kernel/src/drivers/blk.test.ts');

export const CACHE_FAULTS: readonly Mutant[] = [
  fault(
    'moved-page-is-inactive',
    CACHE,
    'this.#toLru(to, list);',
    'this.#toLru(to, L_INACTIVE);',
    'a page in use that moves is the next to be reclaimed',
    HOTPLUG_TEST,
  ),
  fault(
    'kswapd-given-up-for-good',
    RECLAIM,
    'if (freed > 0) Atomics.store(w, T_KSWAPD + node * 16 + K_FAILURES, 0);',
    'if (freed > 0) Atomics.store(w, T_KSWAPD + K_FAILURES, 0);',
    'pages of a node come free, and its kswapd sleeps on',
    RECLAIM_TEST,
  ),
  fault(
    'kswapd-never-gives-up',
    RECLAIM,
    'if (idle >= 3 && reclaimed === 0) Atomics.add(w, at + K_FAILURES, 1);',
    'if (idle >= 3 && reclaimed < 0) Atomics.add(w, at + K_FAILURES, 1);',
    'kswapd runs for ever for a node that has nothing to give',
    RECLAIM_TEST,
  ),
  fault(
    'disk-without-status-is-ok',
    BLK,
    'i32[at + SLOT_STATUS / 4] = 0xff;',
    'i32[at + SLOT_STATUS / 4] = 0;',
    'a request that comes back without a status has gone well',
    BLK_TEST,
  ),
  fault(
    'part-of-a-page-is-all',
    CACHE,
    'this.#get(inode, index, words.length < 1024);',
    'this.#get(inode, index, false);',
    'a short write loses the rest of what is on the disk',
    CACHE_TEST,
  ),
  fault(
    'refused-write-is-clean',
    CACHE,
    'if (!ok && w[page + P_INODE] >= 0 && (',
    'if (false && (',
    'what the disk refused is never written again',
    CACHE_TEST,
  ),
  fault(
    'reclaim-no-freeze',
    CACHE,
    'Atomics.compareExchange(w, page + P_REF, 2, 1) !== 2',
    'Atomics.exchange(w, page + P_REF, 1) < 0',
    'stamps: a page is freed under its user',
    props('cache'),
  ),
  fault(
    'wb-clear-dirty-late',
    CACHE,
    '      Atomics.and(w, page + P_FLAGS, ~PG_WRITEBACK);\n',
    '      Atomics.and(w, page + P_FLAGS, ~(PG_WRITEBACK | PG_DIRTY));\n',
    'model disk: a store during write-back is lost',
    props('cache'),
  ),
  fault(
    'write-not-marked',
    CACHE,
    '    this.markDirty(pfn);\n    this.#alloc.put(pfn);\n    return ok;\n',
    '    this.#alloc.put(pfn);\n    return ok;\n',
    'model disk: a page written is not marked dirty',
    props('cache'),
  ),
  fault(
    'uptodate-early',
    CACHE,
    '      if (fill) {\n        this.#pfns[0]',
    '      Atomics.or(this.#w, this.#memmap + (pfn << 4) + P_FLAGS, PG_UPTODATE);\n      if (fill) {\n        this.#pfns[0]',
    'a page is read before it was filled',
    props('cache'),
  ),
  fault(
    'lookup-without-lock',
    CACHE,
    '  lookup(inode: number, index: number): number {\n    this.#lock();\n',
    '  lookup(inode: number, index: number): number {\n',
    'I19: the hash chains are walked without their lock',
    props('cache'),
  ),
  fault(
    'isolate-keeps-reference',
    RECLAIM,
    "      case 'gone':\n        this.#alloc.put(pfn);\n",
    "      case 'gone':\n",
    'I19: a page whose last reference is lost',
    test('guest-kernel/src/mm/reclaim.test.ts'),
  ),

  fault(
    'isolate-revives',
    RECLAIM,
    '    if (count === 0) return false;\n',
    '',
    'I19: reclaim takes a page whose last reference is gone (found by fuzzing)',
    test('guest-kernel/src/mm/reclaim.test.ts'),
  ),
  fault(
    'kswapd-wants-every-zone',
    RECLAIM,
    'zones.some((z) => watermarkOk',
    'zones.every((z) => watermarkOk',
    'G20: the cache is dropped for a zone that it is not in (`pgdat_balanced`)',
    test('guest-kernel/src/mm/reclaim.test.ts'),
  ),
  fault(
    'sync-forgets-writeback',
    RECLAIM,
    'w[H_NR_DIRTY] + w[H_NR_WRITEBACK] > 0 && rounds',
    'w[H_NR_DIRTY] > 0 && rounds',
    'sync returns before what another CPU writes is on the disk',
    test('guest-kernel/src/mm/reclaim.test.ts'),
  ),
  fault(
    'last-put-looks-plainly',
    'packages/guest-kernel/src/mm/page-alloc.ts',
    'if ((Atomics.load(this.#w, page + P_FLAGS) & PG_LRU) !== 0) this.onLastPut(pfn);',
    'if ((this.#w[page + P_FLAGS] & PG_LRU) !== 0) this.onLastPut(pfn);',
    'a page is freed while a scan still reads its links (found by the search)',
    test('guest-kernel/src/mm/reclaim.test.ts'),
  ),
  fault(
    'disk-error-overwritten',
    BLK,
    'ok = this.#vcpu.u8[this.#vcpu.at] === VIRTIO_BLK_S_OK && ok;',
    'ok = this.#vcpu.u8[this.#vcpu.at] === VIRTIO_BLK_S_OK;',
    'write-back drops what the disk refused',
    BLK_TEST,
  ),
  fault(
    'disk-error-of-a-batch-lost',
    BLK,
    'ok = this.#run(queue, n, 3) && ok;',
    'ok = this.#run(queue, n, 3);',
    'write-back drops what the disk refused',
    BLK_TEST,
  ),
  fault(
    'sector-below-2t',
    BLK,
    'i32[header + 3] = Math.floor(sector / 0x1_0000_0000);',
    'i32[header + 3] = 0;',
    'blocks beyond 2 TiB land at the start',
    BLK_TEST,
  ),
  fault(
    'disk-interrupt-unacknowledged',
    BLK,
    '    this.#guest.driver.takeInterrupt();\n',
    '',
    '§ 4.2.3.4.1: a line that stays up',
    BLK_TEST,
  ),
];
