/** Seeded faults. Memory that comes and goes: device, driver, hotplug, monitors. */
import { fault, props, test, type Mutant } from '../mutant.ts';

const DEVICE = 'packages/host-kvm/src/devices/memory-device.ts';
const VM = 'packages/host-kvm/src/kvm/vm.ts';
const VM_MEMORY = 'packages/host-kvm/src/kvm/vm-memory.ts';
const DRIVER = 'packages/guest-kernel/src/drivers/virtio-mem.ts';
const REGION = 'packages/guest-kernel/src/drivers/mem-region.ts';
const SUB_BLOCKS = 'packages/guest-kernel/src/drivers/mem-sub-blocks.ts';
const HOTPLUG = 'packages/guest-kernel/src/mm/memory-hotplug.ts';
const BUDDY = 'packages/guest-kernel/src/mm/buddy.ts';
const CACHE = 'packages/guest-kernel/src/mm/page-cache.ts';
const ARENA = 'packages/guest-kernel/src/arena.ts';
const EVENTS = 'packages/host-kvm/src/vmm/monitor/events.ts';
const QMP = 'packages/host-kvm/src/vmm/monitor/qmp.ts';
const QOM = 'packages/host-kvm/src/vmm/monitor/qom.ts';

const DEVICE_TEST = test('host-kvm/src/devices/memory-device.test.ts');
const UNPLUGGED_TEST = test('host-kvm/src/devices/unplugged-memory.test.ts');
const HOTPLUG_TEST = test('guest-kernel/src/mm/memory-hotplug.test.ts');
const DRIVER_MODEL = test('guest-kernel/src/drivers/virtio-mem.property.test.ts');
const FIDELITY = test('harness/src/memory-device/fidelity.test.ts');
const SESSION = test('harness/src/vm/vm.test.ts');
const DIMMS = test('harness/src/vm/dimms.test.ts');
const MONITOR = test('host-kvm/src/vmm/monitor/monitor.test.ts');

export const MEMORY_DEVICE_FAULTS: readonly Mutant[] = [
  // ── Device ──
  fault(
    'plug-beyond-request',
    DEVICE,
    '    if (this.#size + nrBlocks * this.blockBytes > this.requestedBytes) return VIRTIO_MEM_RESP_NACK;\n',
    '',
    'QEMU: a plug beyond the requested size is a NACK',
    DEVICE_TEST,
  ),
  fault(
    'plug-what-is-plugged',
    DEVICE,
    '    if (this.#stateOf(addr, nrBlocks) !== VIRTIO_MEM_STATE_UNPLUGGED) return VIRTIO_MEM_RESP_ERROR;\n',
    '',
    '5.15.6.2: a block that is plugged already',
    DEVICE_TEST,
  ),
  fault(
    'unplug-what-is-not',
    DEVICE,
    '    if (this.#stateOf(addr, nrBlocks) !== VIRTIO_MEM_STATE_PLUGGED) return VIRTIO_MEM_RESP_ERROR;\n',
    '',
    '5.15.6.4: a block that is unplugged already',
    DEVICE_TEST,
  ),
  fault(
    'region-end-open',
    DEVICE,
    '      addr >= this.addr &&\n      addr + nrBlocks * this.blockBytes <= this.addr + this.usableBytes\n',
    '      addr >= this.addr\n',
    '5.15.6.2: blocks outside the usable region (H7)',
    DEVICE_TEST,
  ),
  fault(
    'unplug-keeps-frames',
    DEVICE,
    '    yield* this.#discard(addr, pages);\n    close();\n',
    '    close();\n',
    'H10: unplugged memory costs the host nothing',
    props('hostile-memory'),
  ),
  fault(
    'size-not-told',
    DEVICE,
    '    this.#size = bytes;\n    this.#host?.configMoved();\n',
    '    this.#host?.configMoved();\n',
    'plugged_size = population × block size, always',
    DEVICE_TEST,
  ),
  fault(
    'device-reset-unplugs',
    DEVICE,
    '  reset(): void {\n    this.#queue = null;\n',
    '  reset(): void {\n    this.plugged.clear();\n    this.#size = 0;\n    this.#queue = null;\n',
    'I10: a device reset changes no block',
    DEVICE_TEST,
  ),
  fault(
    'usable-shrinks',
    DEVICE,
    '    if (wanted <= this.usableBytes && !mayShrink) return;\n',
    '    if (wanted === this.usableBytes && !mayShrink) return;\n',
    '5.15.4.2: the usable region shrinks only by UNPLUG ALL and reset',
    DEVICE_TEST,
  ),
  fault(
    'resize-untold',
    DEVICE,
    '    this.#resizeUsable(false);\n    this.#host?.configChanged();\n  }\n',
    '    this.#resizeUsable(false);\n  }\n',
    '5.15.4.2: a configuration update notification',
    DEVICE_TEST,
  ),
  fault(
    'busy-plugs',
    DEVICE,
    'if (this.busy || !this.unplugged.fits(this.#first(addr), nrBlocks, true)) return',
    'if (!this.unplugged.fits(this.#first(addr), nrBlocks, true)) return',
    'a plug while a migration runs',
    DEVICE_TEST,
  ),
  fault(
    'plug-keeps-zeros',
    DEVICE,
    "    else if (this.profile !== 'qemu') yield* this.#region.unmap(addr / PAGE_SIZE, pages);\n",
    '',
    'H11: the page of zeros stays mapped where memory has come',
    UNPLUGGED_TEST,
  ),
  fault(
    'reset-leaves-holes',
    DEVICE,
    'if (yield* this.#populate(first, count)) this',
    'if (yield* this.#populate(first + 1, count)) this',
    'I10: no holes after a system reset (H9)',
    props('hostile-memory'),
  ),
  fault(
    'zeros-writable',
    VM,
    'const writable = (slot.flags & KVM_MEM_READONLY) === 0 && !zeros;',
    'const writable = (slot.flags & KVM_MEM_READONLY) === 0;',
    'H12: the shared page of zeros is written to',
    UNPLUGGED_TEST,
  ),
  fault(
    'gate-open',
    VM,
    "const verdict = this.#gates.length === 0 ? 'memory' : this.#verdict(gfn, write);",
    "const verdict = this.#gates.length >= 0 ? 'memory' : this.#verdict(gfn, write);",
    'I2: a profile that promises and does not keep',
    UNPLUGGED_TEST,
  ),
  fault(
    'dma-into-unplugged',
    VM_MEMORY,
    "    return verdict === 'zeros' || verdict === 'nothing' ? null : slot;\n",
    '    return slot;\n',
    '5.15.6: no DMA to unplugged memory',
    UNPLUGGED_TEST,
  ),

  fault(
    'map-count-unchecked',
    DEVICE,
    '    if (this.busy || !this.unplugged.fits(this.#first(addr), nrBlocks, true)) return VIRTIO_MEM_RESP_BUSY;\n',
    '    if (this.busy) return VIRTIO_MEM_RESP_BUSY;\n',
    'H64: more mappings than an address space may have',
    UNPLUGGED_TEST,
  ),

  // ── Driver ──
  fault(
    'unplug-in-use',
    SUB_BLOCKS,
    "    if (online && !this.#hotplug.fakeOffline(pfn, pages, true)) return 'EBUSY';\n",
    '',
    'I20: memory is unplugged while it is on the free lists',
    props('memory-device'),
  ),
  fault(
    'bits-not-cleared',
    REGION,
    'if (type < VIRTIO_MEM_REQ_UNPLUG_ALL) this.setPlugged(pfn, pages, type === VIRTIO_MEM_REQ_PLUG);',
    'if (type === VIRTIO_MEM_REQ_PLUG) this.setPlugged(pfn, pages, true);',
    'the driver forgets what it unplugged',
    props('memory-device'),
  ),
  fault(
    'no-retry',
    DRIVER,
    "      case 'ETXTBSY':\n      case 'ENOMEM':\n        this.#armRetry();",
    "      case 'ETXTBSY':\n      case 'ENOMEM':",
    'BUSY is never tried again (I24)',
    FIDELITY,
  ),
  fault(
    'retry-too-soon',
    DRIVER,
    'const RETRY_MIN_MS = 50_000;',
    'const RETRY_MIN_MS = 5_000;',
    'the retry timer of Linux: 50 s',
    FIDELITY,
  ),
  fault(
    'new-before-holes',
    SUB_BLOCKS,
    'const PLUG_ORDER = [KERNEL_PARTIAL, MOVABLE_PARTIAL, OFFLINE_PARTIAL] as const;',
    'const PLUG_ORDER = [OFFLINE_PARTIAL] as const;',
    'H8: replug before growth',
    FIDELITY,
  ),
  fault(
    'unplug-from-the-bottom',
    SUB_BLOCKS,
    '      for (let b = r.nextBlock - 1; b >= r.firstBlock && left > 0; b--) {\n        if (r.state(b) !== state) continue;\n        const outcome = this.#unplugFrom(b, left);',
    '      for (let b = r.firstBlock; b < r.nextBlock && left > 0; b++) {\n        if (r.state(b) !== state) continue;\n        const outcome = this.#unplugFrom(b, left);',
    "Linux's order: from the highest block",
    FIDELITY,
  ),
  fault(
    'holes-one-by-one',
    SUB_BLOCKS,
    '      while (pages < left * sub && pfn + pages < end && !r.isPlugged(pfn + pages)) pages += sub;',
    '      pages = sub;',
    "Linux's order: one request per run of holes",
    FIDELITY,
  ),
  fault(
    'never-whole-blocks',
    SUB_BLOCKS,
    '    if (left >= all && r.pluggedIn(block) === all) {',
    '    if (left > all * 1000) {',
    "Linux's order: a full block whole first",
    FIDELITY,
  ),

  // ── Hotplug ──
  fault(
    'memmap-leaks',
    HOTPLUG,
    '    this.#freeMemmap(w[record + S_MEMMAP]);\n    w[this.#events + EV.memory_removed]++;',
    '    w[this.#events + EV.memory_removed]++;',
    'H31: the memmap of a removed block is free again',
    props('memory-device'),
  ),
  fault(
    'isolated-counts-free',
    BUDDY,
    '    if (migratetype !== MIGRATE_ISOLATE) w[zone + Z_FREE] += 1 << order;',
    '    w[zone + Z_FREE] += 1 << order;',
    'I19: pages under isolation count as free',
    HOTPLUG_TEST,
  ),
  fault(
    'take-what-is-not-free',
    BUDDY,
    '      if ((w[page + P_FLAGS] & PG_BUDDY) === 0) return false;\n      p += 1 << w[page + P_ORDER];',
    '      p += 1 << w[page + P_ORDER];',
    'I20: pages are taken that somebody allocated meanwhile',
    HOTPLUG_TEST,
  ),
  fault(
    'unisolate-forgets-type',
    BUDDY,
    '    this.setPageblockType(block, migratetype);\n    for (let p = block;',
    '    for (let p = block;',
    'I19: a pageblock stays isolated for ever',
    HOTPLUG_TEST,
  ),
  fault(
    'isolate-without-lock',
    HOTPLUG,
    '    this.#buddy.lock(zone);\n    for (let p = first; p < end; p += PAGEBLOCK_PAGES) this.#buddy.isolatePageblock(zone, p);\n    this.#buddy.unlock(zone);\n',
    '    for (let p = first; p < end; p += PAGEBLOCK_PAGES) this.#buddy.isolatePageblock(zone, p);\n',
    'the zone lock around isolation',
    HOTPLUG_TEST,
  ),
  fault(
    'managed-not-reduced',
    HOTPLUG,
    '        Atomics.sub(w, zone + Z_MANAGED, count);\n',
    '',
    'I19: counters of a zone that lost memory',
    HOTPLUG_TEST,
  ),
  fault(
    'migrate-without-content',
    CACHE,
    '    this.#vcpu.copyPage(gfn(from), gfn(to));\n    const flags',
    '    const flags',
    'I22: a page moves and its content stays',
    props('migration'),
  ),
  fault(
    'migrate-forgets-dirty',
    CACHE,
    'const flags = w[page + P_FLAGS] & (PG_DIRTY | PG_UPTODATE | PG_REFERENCED);',
    'const flags = w[page + P_FLAGS] & (PG_UPTODATE | PG_REFERENCED);',
    'I22: a dirty page moves and is never written back',
    props('migration'),
  ),
  fault(
    'migrate-while-used',
    CACHE,
    '      Atomics.compareExchange(w, page + P_REF, 1, 0) !== 1\n',
    '      Atomics.load(w, page + P_REF) === 0\n',
    'I22: a page moves under somebody who writes to it',
    HOTPLUG_TEST,
  ),
  fault(
    'reset-keeps-arena',
    ARENA,
    '    w.fill(0, 0, this.memmap + last * PAGE_STRUCT_WORDS);\n',
    '    w.fill(0, 0, last > 0 ? 1 : 0);\n',
    'a kernel boots over the books of the one before',
    HOTPLUG_TEST,
  ),

  // ── Monitors ──
  fault(
    'events-not-limited',
    EVENTS,
    '    if (now - limited.sentAt < RATE_NS) {',
    '    if (now < limited.sentAt) {',
    'MEMORY_DEVICE_SIZE_CHANGE at most once a second',
    MONITOR,
  ),
  fault(
    'commands-before-capabilities',
    QMP,
    '    if (!this.negotiated)\n',
    '    if (!this.negotiated && name.length === 0)\n',
    'QMP: nothing before qmp_capabilities',
    SESSION,
  ),
  fault(
    'size-unjudged',
    QOM,
    "          if (why === '') device.setRequested(value);",
    '          device.setRequested(value);',
    'a refused size changes nothing',
    MONITOR,
  ),
  fault(
    'big-block-not-put-back',
    'packages/guest-kernel/src/drivers/mem-big-blocks.ts',
    '      for (let p = first; p < pfn; p += sectionPages) backInUse(p);\n',
    '',
    'I20: an unplug that fails halfway keeps the first half offline',
    test('guest-kernel/src/drivers/virtio-mem.test.ts'),
  ),
  fault(
    'adopts-half',
    REGION,
    '    const end = first + this.unit;\n    for (let pfn = first; pfn < end; pfn += sectionPages) {\n      if',
    '    const end = first + sectionPages;\n    for (let pfn = first; pfn < end; pfn += sectionPages) {\n      if',
    'I20: half of a big block is plugged and never used',
    test('guest-kernel/src/drivers/virtio-mem.test.ts'),
  ),
  fault(
    'poison-outlives-content',
    HOTPLUG,
    '      this.#w[page + P_STAMP] = 0;\n',
    '',
    'I20: pages that come back are checked for poison that went with their content',
    HOTPLUG_TEST,
  ),
  fault(
    'slot-stays',
    DEVICE,
    '    yield* this.#deactivate(addr / PAGE_SIZE, pages);\n',
    '',
    'H32: where nothing is plugged any more there is a memory slot still',
    test('host-kvm/src/devices/region.test.ts'),
  ),
  fault(
    'slot-goes-too-soon',
    'packages/host-kvm/src/devices/region.ts',
    'if (this.#isThere(n) && !anyPlugged(from, to - from)) yield*',
    'if (this.#isThere(n)) yield*',
    'I20: plugged memory loses its slot with the first block that goes',
    test('host-kvm/src/devices/region.test.ts'),
  ),

  // ── The driver against its model ──
  fault(
    'offline-without-limit',
    REGION,
    'return this.offlinePages + this.unit <= this.offlineThreshold;',
    'return this.unit <= this.offlineThreshold;',
    'memory that nobody puts online is added without end',
    DRIVER_MODEL,
  ),
  fault(
    'administrator-unheard',
    DRIVER,
    '    if (done) region.settle(Math.floor(pfn / region.unit));\n',
    '',
    'the driver does not know that a block went offline',
    DRIVER_MODEL,
  ),
  fault(
    'offline-half-undone',
    HOTPLUG,
    '      for (let p = first; p < pfn; p += PAGEBLOCK_PAGES) if (plugged(p)) this.fakeOnline(p, PAGEBLOCK_PAGES);\n',
    '',
    'what could go of a block that could not is lost',
    DRIVER_MODEL,
  ),
  fault(
    'full-blocks-first',
    SUB_BLOCKS,
    '[OFFLINE_PARTIAL, OFFLINE, MOVABLE_PARTIAL, KERNEL_PARTIAL, MOVABLE, KERNEL]',
    '[OFFLINE_PARTIAL, OFFLINE, MOVABLE, KERNEL, MOVABLE_PARTIAL, KERNEL_PARTIAL]',
    'formats 4.10: partial blocks go before full ones',
    DRIVER_MODEL,
  ),

  // ── DIMMs under a monitor ──
  fault(
    'dimm-not-found-at-boot',
    'packages/guest-kernel/src/drivers/acpi-memory.ts',
    '      } else if (isFirst) this.#add(slot);\n      else if',
    '      } else if',
    'G20: the kernel after a reset does without the DIMMs that are in',
    DIMMS,
  ),
  fault(
    'busy-backend-deleted',
    'packages/host-kvm/src/vmm/monitor/hotplug.ts',
    "  if (busyBackends(machine).includes(id)) return err(generic(`object '${id}' is in use, can not be deleted`));\n",
    '',
    'object_del takes the memory of a DIMM that is in',
    DIMMS,
  ),
  fault(
    'dimm-over-device',
    'packages/host-kvm/src/vmm/monitor/place-dimm.ts',
    '    if (at + bytes <= other.addr) break;\n    at = Math.max(at, Math.ceil((other.addr + other.bytes) / DIMM_ALIGN) * DIMM_ALIGN);',
    '    if (at + DIMM_ALIGN <= other.addr) break;\n    at = Math.max(at, Math.ceil((other.addr + other.bytes) / DIMM_ALIGN) * DIMM_ALIGN);',
    'a DIMM is put where another device is',
    MONITOR,
  ),

  // ── Exchange ──
  fault(
    'exchange-not-undone',
    DEVICE,
    '      this.#holder?.map(from / PAGE_SIZE, pages);\n      return VIRTIO_MEM_RESP_BUSY;',
    '      return VIRTIO_MEM_RESP_BUSY;',
    'H44: a device that is refused new pages has lost the old ones, too',
    test('host-kvm/src/devices/memory-device-variants.test.ts'),
  ),
  fault(
    'exchange-of-nothing',
    DEVICE,
    '    if (!this.#valid(from, nrBlocks) || this.#stateOf(from, nrBlocks) !== VIRTIO_MEM_STATE_PLUGGED)\n      return VIRTIO_MEM_RESP_ERROR;\n',
    '',
    'H44: who gives nothing gets something',
    test('host-kvm/src/devices/memory-device-variants.test.ts'),
  ),
  fault(
    'unplug-all-half-asked',
    DEVICE,
    '        for (const back of gone) this.#holder.map(...back);\n',
    '',
    'Y19: a refused UNPLUG ALL takes pages from a device all the same',
    DEVICE_TEST,
  ),
  fault(
    'dimm-over-unplugged',
    'packages/host-kvm/src/vmm/monitor/hotplug.ts',
    'bytes: d.regionBytes })),',
    'bytes: d.pluggedBytes })),',
    'a DIMM is put over the unplugged part of a region',
    DIMMS,
  ),
  fault(
    'offline-limit-of-one',
    REGION,
    'return Math.max(2 * this.unit, this.#hotplug.config.offlinePages);',
    'return Math.max(this.unit, this.#hotplug.config.offlinePages);',
    'two blocks may be offline, however large they are',
    DRIVER_MODEL,
  ),
  fault(
    'compact-across-zones',
    SUB_BLOCKS,
    'partial.filter((b) => b !== donor && r.state(b) === r.state(donor));',
    'partial.filter((b) => b !== donor);',
    'H44: kernel memory is traded for Movable memory',
    test('guest-kernel/src/drivers/virtio-mem.test.ts'),
  ),
  fault(
    'removed-under-a-waiter',
    DRIVER,
    '    spinLock(this.#w, this.#base + M_MUTEX, this.#vcpu.id, this.#relax);\n    Atomics.store(this.#w, this.#base + M_READY, 0);\n',
    '    Atomics.store(this.#w, this.#base + M_READY, 0);\n',
    'hang: rmmod resets the device while another vCPU waits for its answer',
    test('guest-kernel/src/drivers/virtio-mem.test.ts'),
  ),
];
