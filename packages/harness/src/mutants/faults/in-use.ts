/** Seeded faults. What happens while something is in use: resets, resizes, endless buffers, two CPUs in one driver. */
import { fault, test, type Mutant } from '../mutant.ts';

const BALLOON_DEVICE = 'packages/host-kvm/src/devices/balloon.ts';
const BLOCK_DEVICE = 'packages/host-kvm/src/devices/block.ts';
const MEMORY_DEVICE = 'packages/host-kvm/src/devices/memory-device.ts';
const TASKS = 'packages/host-kvm/src/host-tasks.ts';
const VM = 'packages/host-kvm/src/kvm/vm.ts';
const POOL = 'packages/host-kvm/src/mm/frame-pool.ts';
const TRANSPORT = 'packages/virtio/src/device/mmio-transport.ts';
const BALLOON = 'packages/guest-kernel/src/drivers/balloon.ts';
const DRIVER = 'packages/guest-kernel/src/drivers/virtio-mem.ts';
const ALLOC = 'packages/guest-kernel/src/mm/page-alloc.ts';
const CACHE = 'packages/guest-kernel/src/mm/page-cache.ts';

const TIMING = test('host-kvm/src/devices/hostile-timing.test.ts');
const SLOTS = test('host-kvm/src/kvm/slots-in-use.test.ts');
const BALLOON_DRIVER = test('guest-kernel/src/drivers/balloon.conformance.test.ts');
const MEM_DRIVER = test('guest-kernel/src/drivers/virtio-mem.test.ts');
const HOTPLUG = test('guest-kernel/src/mm/memory-hotplug.test.ts');

export const IN_USE_FAULTS: readonly Mutant[] = [
  fault(
    'slot-shown-while-blocks-go',
    VM,
    'while (file.punching) yield () => !file.punching;',
    'yield* [];',
    'I1: a slot created while another VM is asked to flush maps a block that is freed',
    SLOTS,
  ),
  fault(
    'slots-change-at-once',
    VM,
    'while (!this.#slotsLock.tryAcquire()) yield () => !this.#slotsLock.held;\n    try {\n      return yield* change;\n    } finally {\n      this.#slotsLock.release();\n    }',
    'return yield* change;',
    'a slot that is deleted while it moves leaves its pages mapped',
    SLOTS,
  ),
  fault(
    'dimm-slot-chosen-twice',
    'packages/harness/src/run/power-on.ts',
    '      known.set(dimm.id, { file, slot });\n      const done = yield* vm.setUserMemoryRegion(region(dimm, slot, file, dimm.bytes));\n',
    '      const done = yield* vm.setUserMemoryRegion(region(dimm, slot, file, dimm.bytes));\n      known.set(dimm.id, { file, slot });\n',
    'of two DIMMs plugged at once, one is lost',
    test('harness/src/run/dimm-slots.test.ts'),
  ),
  fault(
    'device-never-yields',
    BALLOON_DEVICE,
    '        // Others have their turn after each buffer: a guest may add them as fast as we take them.\n        yield undefined;\n',
    '',
    'a guest that adds buffers for ever holds the host',
    TIMING,
  ),
  fault(
    'lone-task-for-ever',
    TASKS,
    'n < TURNS_ALONE && ',
    '',
    'a lone task that yields for ever keeps the host from looking for exits',
    TIMING,
  ),
  fault(
    'reset-does-not-wait',
    TRANSPORT,
    '    return !this.device.idle;\n',
    '    return false;\n',
    '2.4.1: what a device began before its reset lands after it',
    TIMING,
  ),
  fault(
    'queue-not-stopped',
    TRANSPORT,
    '      this.#queues[this.#queueSel]?.stop();\n      return;\n',
    '      return;\n',
    '4.2.2.1: queue contents are accessed while QueueReady is zero',
    TIMING,
  ),
  fault(
    'completes-after-push',
    BALLOON_DEVICE,
    '        this.#host?.completes(this.#timeline.complete(kicked, cost + this.#port.costs.queueRoundTripNs));\n        queue.push(chain, 0);\n',
    '        queue.push(chain, 0);\n        this.#host?.completes(this.#timeline.complete(kicked, cost + this.#port.costs.queueRoundTripNs));\n',
    'a driver sees a buffer before its completion time',
    TIMING,
  ),
  fault(
    'pop-touches-buffers',
    'packages/virtio/src/device/chain-reader.ts',
    'if (!memory.extent(missed)) break;',
    'if (!memory.window(missed & ~IN_PAGE, PAGE, false) || !memory.extent(missed)) break;',
    'reporting and hinting take frames for what nobody touched',
    TIMING,
  ),
  fault(
    'short-read-is-ok',
    BLOCK_DEVICE,
    '        if (copied !== bytes) return { ...fail(VIRTIO_BLK_S_IOERR), written: copied };\n',
    '',
    'a disk read that did not reach the buffer is answered OK',
    TIMING,
  ),
  fault(
    'storage-error-thrown',
    BLOCK_DEVICE,
    '    } catch {\n      return false;\n',
    '    } catch (error) {\n      throw error;\n',
    'a full host disk ends the host',
    TIMING,
  ),
  fault(
    'unplug-all-unasked',
    MEMORY_DEVICE,
    'if (this.busy || !this.#askUnplugAll())',
    'if (this.busy)',
    'Y19: pages that a device holds are unplugged',
    TIMING,
  ),
  fault(
    'generation-stays',
    MEMORY_DEVICE,
    '    this.#size = bytes;\n    this.#host?.configMoved();\n',
    '    this.#size = bytes;\n',
    '4.2.2.1: a torn read of plugged_size goes unnoticed',
    TIMING,
  ),
  fault(
    'plug-untold',
    MEMORY_DEVICE,
    '    if (this.#holder?.map(gfn, pages) === false) {\n',
    '    if (false as boolean) {\n',
    'Y19: a device with pinned memory does not hear of a block that comes',
    TIMING,
  ),
  fault(
    'reset-untold',
    MEMORY_DEVICE,
    '    for (const [first, count] of runs) this.#holder?.unmap(this.baseGfn + first * pages, count * pages);\n',
    '',
    'Y19: memory that a device has pinned is discarded by a system reset',
    test('host-kvm/src/devices/assigned-device.test.ts'),
  ),
  fault(
    'reset-replugs-untold',
    MEMORY_DEVICE,
    '      if (yield* this.#populate(first, count)) this.#sizeIs(this.#size + count * this.blockBytes);\n',
    '      for (let b = first; b < first + count; b++) this.plugged.add(b);\n    this.#sizeIs(blocks * this.blockBytes);\n',
    'Y19, H9: what a system reset keeps is memory that a device with pinned pages cannot reach',
    test('host-kvm/src/devices/assigned-device.test.ts'),
  ),
  fault(
    'shrink-before-zap',
    VM,
    '    if (nrPages < old.nrPages) yield* this.unmap(old.baseGfn + nrPages, old.nrPages - nrPages, resize);\n    else {',
    '    resize();\n    if (nrPages < old.nrPages) yield* this.unmap(old.baseGfn + nrPages, old.nrPages - nrPages);\n    else {',
    'I4: an invalidation does not find what still maps its pages',
    SLOTS,
  ),
  fault(
    'resize-deletes-first',
    VM,
    '    const judged = this.slots.judge(region, true);\n    if (!judged.ok) return err(judged.error);\n    // The VMM’s own map',
    '    // The VMM’s own map',
    'I11: a resize that cannot be loses the slot',
    SLOTS,
  ),
  fault(
    'device-sees-the-gap',
    VM,
    "    this.slots.replaced = how === 'qemu' ? old : null;\n",
    '',
    'memory is gone for devices between delete and create',
    SLOTS,
  ),
  fault(
    'run-ends-at-the-slot',
    VM,
    '        gfn = stop;\n',
    '        gfn = end;\n',
    'a discard over two slots frees one of them',
    TIMING,
  ),
  fault(
    'tables-not-flushed',
    VM,
    'if (zapped > 0 || this.mmu.detachedTables.length > 0) yield* this.#flushAll();',
    'if (zapped > 0) yield* this.#flushAll();',
    'I17: a table is freed that a walk cache may hold',
    SLOTS,
  ),
  fault(
    'pinned-frame-poisoned',
    POOL,
    'if (this.ledger.pins[f] === 0) this.#poison(hfn(f));',
    'this.#poison(hfn(f));',
    'Y19: data of a transfer under way is overwritten',
    SLOTS,
  ),
  fault(
    'spinner-looks-once',
    'packages/machine/src/controlled-schedule.ts',
    '    if (this.#changed) w[PROGRESS]++;\n    this.#changed = PROGRESSES[code];\n',
    '    this.#changed = PROGRESSES[code];\n',
    'the controlled schedule calls a spinner deadlocked that looked before a store took effect',
    test('harness/src/fuzz/controlled-schedule.test.ts'),
  ),
  fault(
    'old-page-told-first',
    BALLOON,
    '      this.#tellHost(Q_INFLATE, [to]);\n      this.#unlist(from);\n      this.#tellHost(Q_DEFLATE, [from]);\n',
    '      this.#unlist(from);\n      this.#tellHost(Q_DEFLATE, [from]);\n      this.#tellHost(Q_INFLATE, [to]);\n',
    'balloon compaction: for a moment the balloon is smaller than the driver says',
    BALLOON_DRIVER,
  ),
  fault(
    'moved-page-counted-twice',
    BALLOON,
    '      this.#putIn(to);\n      this.#tellHost',
    '      this.#putIn(to);\n      this.#adjustManaged(to, 1);\n      this.#tellHost',
    'Linux 63341ab03706: managed pages of two zones when a balloon page moves between them',
    BALLOON_DRIVER,
  ),
  fault(
    'statistics-forgotten',
    BALLOON,
    '      if (w[T_BALLOON + V_MISSED] !== 0) this.#handleInterrupt();\n',
    '',
    'I24: an interrupt that came while the mutex was held is never looked at',
    BALLOON_DRIVER,
  ),
  fault(
    'shrink-forgotten',
    DRIVER,
    '    if (leftOver) Atomics.store(w, base + M_WORK, 1);\n',
    '',
    'I24: the OOM notifier takes a request to shrink for done',
    MEM_DRIVER,
  ),
  fault(
    'isolated-page-on-pcp',
    ALLOC,
    'migratetype !== MIGRATE_ISOLATE && ',
    '',
    'H16: a page freed in an isolated block is handed out again',
    HOTPLUG,
  ),
  fault(
    'unread-page-up-to-date',
    CACHE,
    '      for (let i = 0; i < count; i++) this.#abandon(pfns[i]);\n      return;\n',
    '',
    'a page that the disk could not fill is read as file content',
    HOTPLUG,
  ),
];
