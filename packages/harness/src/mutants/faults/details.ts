/** Seeded faults. One bound, one bit, one unit: what experts broke and nobody noticed. */
import { fault, test, type Mutant } from '../mutant.ts';

const BALLOON_DEVICE = 'packages/host-kvm/src/devices/balloon.ts';
const VM_MEMORY = 'packages/host-kvm/src/kvm/vm-memory.ts';
const MEMSLOTS = 'packages/host-kvm/src/kvm/memslots.ts';
const TDP_MMU = 'packages/host-kvm/src/kvm/tdp-mmu.ts';
const MEM_FILE = 'packages/memfs/src/mem-file.ts';
const VCPU = 'packages/machine/src/vcpu.ts';
const SPIN_LOCK = 'packages/machine/src/spin-lock.ts';
const SPLIT_DRIVER_QUEUE = 'packages/virtio/src/driver/split-driver-queue.ts';
const MMIO_TRANSPORT = 'packages/virtio/src/device/mmio-transport.ts';
const SPLIT_DEVICE_QUEUE = 'packages/virtio/src/device/split-device-queue.ts';
const BLK = 'packages/guest-kernel/src/drivers/blk.ts';
const BALLOON_DRIVER = 'packages/guest-kernel/src/drivers/balloon.ts';
const KERNEL = 'packages/guest-kernel/src/kernel.ts';
const PAGE_ALLOC = 'packages/guest-kernel/src/mm/page-alloc.ts';
const PER_CPU_PAGES = 'packages/guest-kernel/src/mm/per-cpu-pages.ts';
const BUDDY = 'packages/guest-kernel/src/mm/buddy.ts';
const BOOT = 'packages/guest-kernel/src/boot.ts';
const PROCFS = 'packages/guest-kernel/src/procfs.ts';
const FIDELITY = 'packages/harness/src/fidelity.ts';
const MEMORY_FIDELITY = 'packages/harness/src/memory-device/fidelity.ts';
const IMPORT = 'packages/harness/src/trace/import.ts';
const CAPTURE = 'packages/harness/src/trace/capture.ts';
const REPLAY_PROGRAM = 'packages/harness/src/run/replay-program.ts';
const BALLOON_TEST = test('host-kvm/src/devices/balloon.test.ts');
const VM_TEST = test('host-kvm/src/kvm/vm.test.ts');
const SLOTS_IN_USE_TEST = test('host-kvm/src/kvm/slots-in-use.test.ts');
const MEM_FILE_TEST = test('memfs/src/mem-file.test.ts');
const GUEST_MMU_TEST = test('machine/src/guest-mmu.test.ts');
const LOCK_ORDER_TEST = test('machine/src/lock-order.test.ts');
const SPLIT_RING_TEST = test('virtio/src/conformance/split-ring.test.ts');
const MMIO_TEST = test('virtio/src/conformance/mmio.test.ts');
const BLK_TEST = test('guest-kernel/src/drivers/blk.test.ts');
const BALLOON_CONFORMANCE_TEST = test('guest-kernel/src/drivers/balloon.conformance.test.ts');
const ALLOCATOR_PROPERTY_TEST = test('guest-kernel/src/mm/allocator.property.test.ts');
const PROCFS_TEST = test('guest-kernel/src/procfs.test.ts');
const FIDELITY_TEST = test('harness/src/fidelity.test.ts');
const MEMORY_FIDELITY_TEST = test('harness/src/memory-device/fidelity.test.ts');
const IMPORT_TEST = test('harness/src/trace/import.test.ts');
const CAPTURE_TEST = test('harness/src/trace/capture.test.ts');
const REPLAY_PROGRAM_TEST = test('harness/src/run/replay-program.test.ts');

export const DETAIL_FAULTS: readonly Mutant[] = [
  fault(
    'deflate-keeps-partial',
    BALLOON_DEVICE,
    '        if (this.#partial.length > 0) this.#partial.delete(pfn);\n',
    '',
    'I15: a part that was taken out counts towards its host page',
    BALLOON_TEST,
  ),
  fault(
    'hint-rounds-out',
    BALLOON_DEVICE,
    'const first = Math.ceil(chain.gpas[i] / 4096);',
    'const first = Math.floor(chain.gpas[i] / 4096);',
    'I6: a page that is partly in use counts as free',
    BALLOON_TEST,
  ),
  fault(
    'reset-keeps-hint-id',
    BALLOON_DEVICE,
    '    this.#hintBitmap = null;\n    this.hintCommandId = FREE_PAGE_HINT_STOP;\n',
    '    this.#hintBitmap = null;\n',
    'a new driver hints for a round that nobody runs',
    BALLOON_TEST,
  ),
  fault(
    'reset-keeps-poison',
    BALLOON_DEVICE,
    '    this.poisonValue = 0;\n',
    '',
    'reports of a driver that does not poison are skipped for ever',
    BALLOON_TEST,
  ),
  fault(
    'poison-unnegotiated',
    BALLOON_DEVICE,
    'else if (offset === BALLOON_CFG_POISON_VAL && features.has(VIRTIO_BALLOON_F_PAGE_POISON))',
    'else if (offset === BALLOON_CFG_POISON_VAL)',
    'a field that was not negotiated is written',
    BALLOON_TEST,
  ),
  fault(
    'device-write-clean',
    VM_MEMORY,
    '    if (write) this.#frameFlags[frame] |= FRAME_DIRTY;\n',
    '',
    'I7: what a device writes is clean',
    VM_TEST,
  ),
  fault(
    'device-writes-rom',
    VM_MEMORY,
    'if (slot === null || (write && (slot.flags & KVM_MEM_READONLY) !== 0)) return null;',
    'if (slot === null) return null;',
    'G2: a device writes a read-only slot',
    VM_TEST,
  ),
  fault(
    'live-slot-turns-read-only',
    MEMSLOTS,
    '        changed !== 0\n',
    '        changed < 0\n',
    'K: writable leaves of a slot that is read-only now',
    VM_TEST,
  ),
  fault(
    'failed-split-counted',
    TDP_MMU,
    '          this.#clearLeaf(word, span);\n          this.#live[table]--;\n          zapped++;\n          continue;',
    '          this.#clearLeaf(word, span);\n          zapped++;\n          continue;',
    'I9: a table that maps nothing is kept',
    SLOTS_IN_USE_TEST,
  ),
  fault(
    'huge-but-for-the-last',
    MEM_FILE,
    'for (let i = 1; i < HUGE_PAGES; i++) if (this.blocks[base + i] !== first + i) return false;',
    'for (let i = 1; i < HUGE_PAGES - 1; i++) if (this.blocks[base + i] !== first + i) return false;',
    "I1 I4: a large leaf maps somebody else's last frame",
    MEM_FILE_TEST,
  ),
  fault(
    'huge-but-not-aligned',
    MEM_FILE,
    'if (first < 0 || first % HUGE_PAGES !== 0 || base',
    'if (first < 0 || base',
    'reserved bits of a large leaf',
    MEM_FILE_TEST,
  ),
  fault(
    'hole-but-for-the-last',
    MEM_FILE,
    'for (let i = 0; i < count; i++) if (this.blocks[base + i] >= 0) return false;',
    'for (let i = 0; i < count - 1; i++) if (this.blocks[base + i] >= 0) return false;',
    'I15 I9: a block that has a frame gets another',
    MEM_FILE_TEST,
  ),
  fault(
    'fallocate-beyond',
    MEM_FILE,
    'i % HUGE_PAGES === 0 && i + HUGE_PAGES <= first + count',
    'i % HUGE_PAGES === 0',
    'Y27: more than the missing blocks',
    MEM_FILE_TEST,
  ),
  fault(
    'wrap-keeps-combined',
    VCPU,
    '      this.#combined.fill(-1);\n      this.#epochNumber = 0;',
    '      this.#epochNumber = 0;',
    'I17: a combined mapping from 255 flushes ago',
    GUEST_MMU_TEST,
  ),
  fault(
    'stall-bucket-doubled',
    VCPU,
    'const bucket = 4 * (exponent - 8)',
    'const bucket = 4 * (exponent - 7)',
    'percentiles of stalls are twice what they are',
    GUEST_MMU_TEST,
  ),
  fault(
    'interrupts-taken-in-two-steps',
    VCPU,
    'return Atomics.exchange(control, at, 0);',
    'const lines = Atomics.load(control, at);\n    Atomics.store(control, at, 0);\n    return lines;',
    'I24: a line raised in between is lost',
    GUEST_MMU_TEST,
  ),
  fault(
    'lock-tried-in-two-steps',
    SPIN_LOCK,
    'if (Atomics.compareExchange(words, index, 0, holder + 1) !== 0) return false;',
    'if (Atomics.load(words, index) !== 0) return false;\n  Atomics.store(words, index, holder + 1);',
    'two holders of one lock',
    LOCK_ORDER_TEST,
  ),
  fault(
    'batch-not-kicked',
    SPLIT_DRIVER_QUEUE,
    '    Atomics.store(u16, (memory.at + AVAIL_IDX) >> 1, published);\n    s[base + S_PUBLISHED] = published;\n',
    '    Atomics.store(u16, (memory.at + AVAIL_IDX) >> 1, published);\n',
    'I24: a batch that is published asks for no kick',
    SPLIT_RING_TEST,
  ),
  fault(
    'batch-reaped-twice',
    SPLIT_DRIVER_QUEUE,
    '    s[base + S_USED_SEEN] = last;\n',
    '',
    'I21: entries of before are reaped again',
    SPLIT_RING_TEST,
  ),
  fault(
    'used-ring-misaligned',
    MMIO_TRANSPORT,
    'queue.device[0] % 4 !== 0',
    'queue.device[0] % 2 !== 0',
    '§ 2.7: a used ring at two of four',
    MMIO_TEST,
  ),
  fault(
    'reset-keeps-features',
    MMIO_TRANSPORT,
    '    this.#driverFeatures = [0, 0];\n',
    '',
    'features of the driver before',
    MMIO_TEST,
  ),
  fault(
    'indirect-uncounted',
    SPLIT_DEVICE_QUEUE,
    'left = Math.min(limit, size - segments);',
    'left = Math.min(limit, size);',
    'DESIGN § 8: a chain longer than the queue',
    SPLIT_RING_TEST,
  ),
  fault(
    'writable-in-rom',
    SPLIT_DEVICE_QUEUE,
    'memory.contains(low, length, writable);',
    'memory.contains(low, length, false);',
    'a buffer to be written lies in read-only memory',
    SPLIT_RING_TEST,
  ),
  fault(
    'segment-below-4g',
    SPLIT_DRIVER_QUEUE,
    'i32[at + 1] = Math.floor(segment.gpa / 0x1_0000_0000);',
    'i32[at + 1] = 0;',
    'an address of 32 bits',
    SPLIT_RING_TEST,
  ),
  fault(
    'table-below-4g',
    SPLIT_DRIVER_QUEUE,
    'memory.i32[at + 1] = Math.floor(table / 0x1_0000_0000);',
    'memory.i32[at + 1] = 0;',
    'an address of 32 bits',
    SPLIT_RING_TEST,
  ),
  fault(
    'used-ring-below-4g',
    MMIO_TRANSPORT,
    'device: queue.device[1] * 0x1_0000_0000 + queue.device[0],',
    'device: queue.device[0],',
    'an address of 32 bits',
    SPLIT_RING_TEST,
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
    'ok = this.#run(queue, n) && ok;',
    'ok = this.#run(queue, n);',
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
  fault(
    'oom-actual-not-told',
    BALLOON_DRIVER,
    '      freed = this.#leak(VIRTIO_BALLOON_ARRAY_PFNS_MAX);\n      this.#guest.driver.writeConfig32(BALLOON_CFG_ACTUAL, this.#w[T_BALLOON + V_NR_PAGES]);\n',
    '      freed = this.#leak(VIRTIO_BALLOON_ARRAY_PFNS_MAX);\n',
    'The driver MUST update actual, in its OOM notifier too',
    BALLOON_CONFORMANCE_TEST,
  ),
  fault(
    'stat-tags-swapped',
    BALLOON_DRIVER,
    "event('pgscan_kswapd') * 4096,\n      event('pgscan_direct') * 4096,",
    "event('pgscan_direct') * 4096,\n      event('pgscan_kswapd') * 4096,",
    'figures under each other’s tags',
    BALLOON_CONFORMANCE_TEST,
  ),
  fault(
    'hinted-kept-under-pressure',
    KERNEL,
    'reclaim.direct(node) + balloon.shrinkHinted()',
    'reclaim.direct(node)',
    'memory held for a hint cannot be had',
    BALLOON_CONFORMANCE_TEST,
  ),
  fault(
    'unbound-tells-nothing',
    BALLOON_DRIVER,
    '    this.#guest.driver.writeConfig32(BALLOON_CFG_ACTUAL, 0);\n',
    '',
    'unbinding writes actual = 0 once',
    BALLOON_CONFORMANCE_TEST,
  ),
  fault(
    'poison-short',
    PAGE_ALLOC,
    'vcpu.u8.fill(0xaa, vcpu.at, vcpu.at + 4096);',
    'vcpu.u8.fill(0xaa, vcpu.at, vcpu.at + 4092);',
    'the last word of a page is not poisoned',
    ALLOCATOR_PROPERTY_TEST,
  ),
  fault(
    'drain-answered-first',
    PER_CPU_PAGES,
    '    this.drain(this.#vcpu.id);\n    Atomics.store(this.#w, at, 0);',
    '    Atomics.store(this.#w, at, 0);\n    this.drain(this.#vcpu.id);',
    'a drain is over before its pages are back',
    ALLOCATOR_PROPERTY_TEST,
  ),
  fault(
    'merged-head-keeps-type',
    BUDDY,
    'for (let p = pfn; p < pfn + (1 << order); p += PAGEBLOCK_PAGES) {\n      this.w',
    'for (let p = pfn + PAGEBLOCK_PAGES; p < pfn + (1 << order); p += PAGEBLOCK_PAGES) {\n      this.w',
    'I19: a block on a list that is not its type’s',
    ALLOCATOR_PROPERTY_TEST,
  ),
  fault(
    'fallback-order',
    BUDDY,
    '  [MIGRATE_RECLAIMABLE, MIGRATE_MOVABLE],\n',
    '  [MIGRATE_MOVABLE, MIGRATE_RECLAIMABLE],\n',
    'unmovable pages go among movable ones first',
    ALLOCATOR_PROPERTY_TEST,
  ),
  fault(
    'no-lowmem-reserve',
    PAGE_ALLOC,
    '<= mark + w[zone + Z_RESERVE + highestType]',
    '<= mark',
    'a low zone is used up by who could do without',
    ALLOCATOR_PROPERTY_TEST,
  ),
  fault(
    'reserved-managed',
    BOOT,
    '      else w[zone + Z_MANAGED]++;',
    '      w[zone + Z_MANAGED]++;',
    'MemTotal and watermarks count what is reserved',
    PROCFS_TEST,
  ),
  fault(
    'pgfree-by-block',
    PAGE_ALLOC,
    'w[this.#events + EV.pgfree] += count;',
    'w[this.#events + EV.pgfree]++;',
    'vmstat counts a block as a page',
    ALLOCATOR_PROPERTY_TEST,
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
