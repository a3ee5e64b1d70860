/**
 * The catalogue of seeded faults. Each is one edit in one place, of the kinds that people make: a lock, a barrier, a
 * publish, an acknowledgement wait, a flush, a zeroing, a bounds check, an isolation step, a notification, a retry.
 */
import type { Catcher, Equivalent, Mutant } from './mutant.ts';

const VCPU = 'packages/machine/src/vcpu.ts';
const PORT = 'packages/machine/src/exit-port.ts';
const BELL = 'packages/machine/src/doorbell.ts';
const LOCK = 'packages/machine/src/spin-lock.ts';
const LEDGER = 'packages/machine/src/ledger.ts';
const VM = 'packages/host-kvm/src/kvm/vm.ts';
const MMU = 'packages/host-kvm/src/kvm/tdp-mmu.ts';
const SLOTS = 'packages/host-kvm/src/kvm/memslots.ts';
const POOL = 'packages/host-kvm/src/mm/frame-pool.ts';
const HOST_BUDDY = 'packages/host-kvm/src/mm/host-buddy.ts';
const BALLOON_DEVICE = 'packages/host-kvm/src/devices/balloon.ts';
const BLOCK_DEVICE = 'packages/host-kvm/src/devices/block.ts';
const FILE = 'packages/memfs/src/mem-file.ts';
const DRIVER_QUEUE = 'packages/virtio/src/driver/split-driver-queue.ts';
const DEVICE_QUEUE = 'packages/virtio/src/device/split-device-queue.ts';
const TRANSPORT = 'packages/virtio/src/device/mmio-transport.ts';
const BUDDY = 'packages/guest-kernel/src/mm/buddy.ts';
const PCP = 'packages/guest-kernel/src/mm/per-cpu-pages.ts';
const ALLOC = 'packages/guest-kernel/src/mm/page-alloc.ts';
const CACHE = 'packages/guest-kernel/src/mm/page-cache.ts';
const RECLAIM = 'packages/guest-kernel/src/mm/reclaim.ts';
const BALLOON = 'packages/guest-kernel/src/drivers/balloon.ts';
const GUEST_QUEUE = 'packages/guest-kernel/src/drivers/virtio-guest.ts';

const props = (...properties: string[]): Catcher => ({ properties });
const test = (path: string): Catcher => ({ test: `packages/${path}` });

const VM_TEST = test('host-kvm/src/kvm/vm.test.ts');
const MMU_TEST = test('host-kvm/src/kvm/tdp-mmu.test.ts');
const BAD_RINGS = test('virtio/src/conformance/bad-rings.test.ts');
const BALLOON_TEST = test('host-kvm/src/devices/balloon.test.ts');
const DRIVER_TEST = test('guest-kernel/src/drivers/balloon.conformance.test.ts');
const ALLOC_TEST = test('guest-kernel/src/mm/allocator.property.test.ts');

function fault(
  name: string,
  file: string,
  find: string,
  replace: string,
  stands: string,
  by: Catcher,
): Mutant {
  return { name, file, find, replace, stands, by };
}

export const MUTANTS: readonly Mutant[] = [
  // ── Invalidation: the host's side ──
  fault(
    'skip-flush',
    VM,
    'if (zapped > 0) yield* this.#flushAll();',
    '',
    'I4 I17: no flush before frames are freed',
    props('invalidation'),
  ),
  fault(
    'flush-one-vcpu',
    VM,
    'for (let v = 0; v < this.nrVcpus; v++) {\n      this.#schedule.point',
    'for (let v = 0; v < 1; v++) {\n      this.#schedule.point',
    'I17: one vCPU not asked',
    props('invalidation'),
  ),
  fault(
    'no-ack-wait',
    VM,
    '    yield () => !pending();\n',
    '',
    'I4 I17: no wait for the acknowledgement',
    props('invalidation'),
  ),
  fault(
    'one-ack-is-enough',
    VM,
    'if (((Atomics.load(control, base + VC_FLUSH_ACK) - want[v]) | 0) < 0) return true;',
    'return ((Atomics.load(control, base + VC_FLUSH_ACK) - want[v]) | 0) < 0;',
    'I17: one vCPU not awaited',
    props('invalidation'),
  ),
  fault(
    'mode-before-request',
    VM,
    'want.push(Atomics.add(control, this.#base(v) + VC_FLUSH_REQ, 1) + 1);',
    'want.push(\n        Atomics.load(control, this.#base(v) + VC_MODE) === MODE_OUTSIDE\n          ? Atomics.load(control, this.#base(v) + VC_FLUSH_REQ)\n          : Atomics.add(control, this.#base(v) + VC_FLUSH_REQ, 1) + 1,\n      );',
    'I17: the mode is loaded before the request is set',
    props('invalidation'),
  ),
  fault(
    'free-before-zap',
    FILE,
    '    for (const listener of told) yield* listener.begin(runs, nrRuns);\n',
    '',
    'I4: frames freed while mapped',
    props('invalidation'),
  ),
  fault(
    'no-invalidate-retry',
    VM,
    'if (this.#mustRetry(gfn, sequence)) {',
    'if (false as boolean) {',
    'I4: the fault path does not look again',
    props('invalidation'),
  ),
  fault(
    'seq-after-resolve',
    VM,
    'if (this.#mustRetry(gfn, sequence)) {',
    'if (this.#mustRetry(gfn, this.#sequence)) {',
    'I4: sequence sampled after the resolve',
    props('invalidation'),
  ),
  fault(
    'sequence-stands-still',
    VM,
    '    this.#sequence++;\n',
    '',
    'I4: the sequence does not move at the end',
    props('invalidation'),
  ),
  fault(
    'zap-plain-store',
    MMU,
    'const low = Atomics.exchange(this.#dram, word, 0);',
    'const low = Atomics.load(this.#dram, word);\n    Atomics.store(this.#dram, word, 0);',
    'I18: a D bit set between load and store is lost',
    props('invalidation'),
  ),
  fault(
    'dirty-not-harvested',
    MMU,
    '    this.#harvest(frame, pages, low);\n',
    '',
    'I18: dirty state dies with its mapping',
    props('invalidation'),
  ),
  fault(
    'split-drops-dirty',
    MMU,
    'const keep = low & (0xfff & ~EPT_PS);',
    'const keep = low & (0xfff & ~EPT_PS & ~EPT_D);',
    'I18 I7: split children start clean',
    MMU_TEST,
  ),
  fault(
    'split-drops-a-page',
    MMU,
    'const to = frame + i * step;',
    'const to = frame + (i === 511 ? 510 : i) * step;',
    'I4: a split maps one page twice',
    MMU_TEST,
  ),
  fault(
    'tables-freed-at-once',
    MMU,
    '        this.detachedTables.push(child);\n',
    '        this.#pool.free(hfn(child), 1);\n',
    'I4: a table is freed before the flush',
    props('invalidation'),
  ),
  fault(
    'zap-one-short',
    MMU,
    'const last = Math.min(511, Math.floor((to - 1 - tableBase) / span));',
    'const last = Math.min(511, Math.floor((to - 2 - tableBase) / span));',
    'I4: the last page of a range stays mapped',
    props('invalidation'),
  ),
  fault(
    'no-zeroing',
    POOL,
    '    this.memory.zeroFrames(hfn(frame), count);\n',
    '',
    'I1: frames change owner with their content',
    props('isolation'),
  ),
  fault(
    'discard-frees-nothing',
    FILE,
    '      this.#frames.free(hfn(freed[i]), freed[i + 1]);\n',
    '',
    'firecracker#6167: a discard that returns no frame',
    VM_TEST,
  ),
  fault(
    'hole-keeps-its-frame',
    FILE,
    '      this.blocks[i] = -1;\n',
    '',
    'I4: a freed block still resolves',
    props('invalidation'),
  ),
  fault(
    'slot-removed-before-flush',
    VM,
    'if (this.mmu.zapRange(old.baseGfn, old.nrPages) > 0) yield* this.#flushAll();',
    'this.mmu.zapRange(old.baseGfn, old.nrPages);',
    'I11: a slot goes while TLBs reach it',
    props('slots'),
  ),
  fault(
    'mmio-gen-stale',
    SLOTS,
    '    this.generation++;\n  }\n\n  remove',
    '  }\n\n  remove',
    'K5: no generation bump on a slot change',
    VM_TEST,
  ),
  fault(
    'slot-overlap-allowed',
    SLOTS,
    "        return err('EEXIST');\n",
    '        continue;\n',
    'K3: overlapping slots',
    VM_TEST,
  ),
  fault(
    'pins-ignored',
    LEDGER,
    'if (this.pins[f] > 0) {',
    'if (false as boolean) {',
    'Y19 I4: a pinned frame is freed',
    VM_TEST,
  ),
  fault(
    'generation-stands-still',
    LEDGER,
    '      this.generation[f] = (this.generation[f] + 1) | 0;\n',
    '',
    'the gate itself: a stale translation passes',
    VM_TEST,
  ),
  fault(
    'host-buddy-order',
    HOST_BUDDY,
    '|| this.#order[buddy] !== o) break;',
    '|| this.#order[buddy] < 0) break;',
    'I9: the host merges unequal blocks',
    test('host-kvm/src/mm/host-buddy.property.test.ts'),
  ),

  fault(
    'removed-slot-polled',
    VM,
    '        yield () => this.slots.find(gfn) !== slot;\n        continue;\n',
    '        yield undefined;\n        continue;\n',
    'I24: a fault polls for a slot that waits for a flush (found by fuzzing)',
    props('slots'),
  ),

  fault(
    'end-not-told',
    FILE,
    '    for (const listener of told) listener.end(runs, nrRuns);\n',
    '    for (const listener of this.#listeners) listener.end(runs, nrRuns);\n',
    'I24: a mapper that leaves during an invalidation never hears of its end (found by fuzzing)',
    props('slots'),
  ),

  // ── The vCPU's side ──
  fault(
    'mode-after-check',
    VCPU,
    '    Atomics.store(this.#control, this.#base + VC_MODE, MODE_GUEST);\n    this.section++;\n    this.beginSection();\n',
    '    this.section++;\n    this.beginSection();\n    Atomics.store(this.#control, this.#base + VC_MODE, MODE_GUEST);\n',
    'I17: requests loaded before the mode is stored',
    props('invalidation'),
  ),
  fault(
    'ack-before-drop',
    VCPU,
    '    this.#epochNumber++;\n    this.#loadPage',
    '    Atomics.store(this.#control, this.#base + VC_FLUSH_ACK, request);\n    this.#epochNumber++;\n    this.#loadPage',
    'I4: acknowledged before the TLB is dropped',
    props('invalidation'),
  ),
  fault(
    'outside-forgets-request',
    VCPU,
    '    this.section++;\n    this.beginSection();\n',
    '    this.section++;\n    this.#seen = Atomics.load(this.#control, this.#base + VC_FLUSH_REQ);\n    this.beginSection();\n',
    'I17: a request made while outside is lost',
    props('invalidation'),
  ),
  fault(
    'flush-keeps-epoch',
    VCPU,
    '    this.#epoch = this.#epochNumber << EPOCH_SHIFT;\n',
    '',
    'I4: a flush that drops nothing',
    props('invalidation'),
  ),
  fault(
    'translation-over-check',
    VCPU,
    '    this.#loadPage = -1;\n    this.#storePage = -1;\n    this.#pwcGiga',
    '    this.#pwcGiga',
    'I4: the last page outlives the flush',
    test('harness/src/check/hammer.test.ts'),
  ),
  fault(
    'walk-cache-survives',
    VCPU,
    '    this.#pwcGiga = -1;\n    this.#pwcHuge = -1;\n    if',
    '    if',
    'I4: cached tables outlive the flush',
    props('invalidation'),
  ),
  fault(
    'ad-blind-or',
    VCPU,
    'Atomics.compareExchange(dram, walk.word, walk.low, walk.low | set) !== walk.low',
    '(Atomics.or(dram, walk.word, set) & 0) !== 0',
    'a bit set in a cleared entry revives it',
    props('invalidation'),
  ),
  fault(
    'write-through-clean',
    VCPU,
    'table[slot + 1] = write || (walk.low & (EPT_W | EPT_D)) === (EPT_W | EPT_D) ? tag : -1;',
    'table[slot + 1] = tag;',
    'I18: stores without a D bit',
    props('invalidation'),
  ),
  fault(
    'write-needs-no-permission',
    VCPU,
    'const need = write ? EPT_R | EPT_W : EPT_R;',
    'const need = EPT_R;',
    'K: stores through a read-only leaf',
    VM_TEST,
  ),
  fault(
    'port-never-nudges',
    PORT,
    '    nudgeSleepingHost(this.#runControl);\n    for',
    '    for',
    'I24: an exit does not wake the host',
    props('invalidation'),
  ),
  fault(
    'ack-does-not-wake',
    VCPU,
    '    nudgeSleepingHost(this.#runControl);\n    this.stall(this.costs.flushPerVcpuNs);',
    '    this.stall(this.costs.flushPerVcpuNs);',
    'I24: an acknowledgement does not wake the host',
    props('invalidation'),
  ),
  fault(
    'leave-does-not-wake',
    VCPU,
    '    this.#outside();\n    nudgeSleepingHost(this.#runControl);\n',
    '    this.#outside();\n',
    'I24: leaving guest mode does not wake the host',
    props('invalidation'),
  ),
  fault(
    'bell-rings-unheard',
    BELL,
    '    Atomics.add(runControl, RC_DOORBELL, 1);\n    Atomics.notify',
    '    Atomics.notify',
    'I24: notify without a new count',
    props('invalidation'),
  ),
  fault(
    'done-without-notify',
    VM,
    '    if (old === EXIT_REQUEST_SLEEPING) Atomics.notify(this.#control, base + VC_EXIT_STATE);\n',
    '',
    'I24: a sleeping vCPU is not told',
    props('invalidation'),
  ),
  fault(
    'done-before-answer',
    VM,
    '    this.#control[base + VC_EXIT_RESULT] = result;\n    this.#control[base + VC_EXIT_RDATA] = data;\n    this.#controlF64[this.#baseF64(vcpu) + VC_EXIT_COST_F64] = cost;\n    const old = Atomics.exchange(this.#control, base + VC_EXIT_STATE, EXIT_DONE);\n',
    '    const old = Atomics.exchange(this.#control, base + VC_EXIT_STATE, EXIT_DONE);\n    this.#control[base + VC_EXIT_RESULT] = result;\n    this.#control[base + VC_EXIT_RDATA] = data;\n    this.#controlF64[this.#baseF64(vcpu) + VC_EXIT_COST_F64] = cost;\n',
    'the answer follows its publication',
    props('invalidation', 'slots'),
  ),
  fault(
    'sleep-unannounced',
    PORT,
    'if (Atomics.compareExchange(control, state, EXIT_REQUEST, EXIT_REQUEST_SLEEPING) !== EXIT_REQUEST) return;',
    'if (Atomics.load(control, state) === EXIT_DONE) return;',
    'I24: sleeps without saying so',
    props('invalidation'),
  ),
  fault(
    'interrupt-without-notify',
    VM,
    '      Atomics.notify(this.#control, irq);\n',
    '',
    'I24: a halted vCPU is not woken',
    props('balloon'),
  ),

  // ── Locks ──
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

  // ── The guest's allocator ──
  fault(
    'buddy-order-unchecked',
    BUDDY,
    'if ((w[page + P_FLAGS] & PG_BUDDY) === 0 || w[page + P_ORDER] !== o) break;',
    'if ((w[page + P_FLAGS] & PG_BUDDY) === 0) break;',
    'I19: merges unequal blocks',
    props('allocator'),
  ),
  fault(
    'buddy-not-free',
    BUDDY,
    'if ((w[page + P_FLAGS] & PG_BUDDY) === 0 || w[page + P_ORDER] !== o) break;',
    'if (w[page + P_ORDER] !== o) break;',
    'I19: merges with a block in use',
    props('allocator'),
  ),
  fault(
    'expand-forgets-half',
    BUDDY,
    '      this.#addHead(zone, pfn + (1 << o), o, migratetype);\n',
    '      if (o > 0) this.#addHead(zone, pfn + (1 << o), o, migratetype);\n',
    'I19: a half is lost when a block is split',
    props('allocator'),
  ),
  fault(
    'free-count-drifts',
    BUDDY,
    '      w[zone + Z_FREE] -= 1 << order;\n      return pfn;\n    }\n    return -1;',
    '      w[zone + Z_FREE] -= 1;\n      return pfn;\n    }\n    return -1;',
    'I19: the free count drifts',
    props('allocator'),
  ),
  fault(
    'no-init-on-alloc',
    ALLOC,
    'if (this.#options.initOnAlloc) vcpu.zeroPages(gfn(pfn), count);',
    '',
    'I2: a fresh page shows its old content',
    props('allocator'),
  ),
  fault(
    'pcp-count-drifts',
    PCP,
    '    w[pcp + C_COUNT] -= 1 << order;\n    return pfn;',
    '    w[pcp + C_COUNT] -= 1;\n    return pfn;',
    'I19: the per-CPU count drifts',
    props('allocator'),
  ),
  fault(
    'isolate-keeps-block',
    BUDDY,
    '    this.#remove(zone, pfn, order, this.pageblockType(pfn));\n    w[zone + Z_FREE]',
    '    w[zone + Z_FREE]',
    'L25 I3: a block is reported while it can be allocated',
    props('reporting'),
  ),

  // ── Reporting and balloon ──
  fault(
    'report-putback-early',
    GUEST_QUEUE,
    '    const token = this.waitUsed(queue);\n',
    '    const token = 0;\n',
    'I3 I5: no wait for the acknowledgement',
    props('reporting', 'balloon'),
  ),
  fault(
    'report-ack-early',
    BALLOON_DEVICE,
    '        const cost = yield* this.#handle(role, chain);\n',
    '        if (role === "reporting") queue.push(chain, 0);\n        const cost = yield* this.#handle(role, chain);\n',
    'I3: acknowledged before the discard',
    props('reporting'),
  ),
  fault(
    'inflate-ack-then-discard',
    BALLOON_DEVICE,
    '        const cost = yield* this.#handle(role, chain);\n',
    '        if (role === "inflate") queue.push(chain, 0);\n        const cost = yield* this.#handle(role, chain);\n',
    'I3b I16: the buffer is returned before the discard',
    props('balloon'),
  ),
  fault(
    'deflate-release-first',
    BALLOON,
    '    this.#tellHost(Q_DEFLATE, pages);\n    for',
    '    for',
    'I5: pages used before the deflate is acknowledged',
    DRIVER_TEST,
  ),
  fault(
    'discard-rounds-out',
    VM,
    'const from = Math.ceil(first / unit) * unit;',
    'const from = Math.floor(first / unit) * unit;',
    'I15: a range rounded outward',
    VM_TEST,
  ),
  fault(
    'poison-ignored',
    BALLOON_DEVICE,
    'if (this.inhibited || this.poisonValue !== 0 || gpa % unitBytes',
    'if (this.inhibited || gpa % unitBytes',
    'PAGE_POISON: content promised is discarded',
    BALLOON_TEST,
  ),
  fault(
    'inhibit-ignored',
    BALLOON_DEVICE,
    'if (runs.length === 0 || this.inhibited) return',
    'if (runs.length === 0) return',
    'Y19: pinned memory is discarded',
    BALLOON_TEST,
  ),
  fault(
    'partial-survives-reset',
    BALLOON_DEVICE,
    '    this.#partial.clear();\n',
    '',
    'QEMU 2019: a half-ballooned page survives a reset',
    BALLOON_TEST,
  ),
  fault(
    'hint-of-old-round',
    BALLOON_DEVICE,
    "} else if (id === this.hintCommandId && this.#hintState === 'requested') this.#hintState = 'start';",
    "} else if (this.#hintState === 'requested') this.#hintState = 'start';",
    'The device MUST ignore pages of a command ID that does not match',
    BALLOON_TEST,
  ),
  fault(
    'actual-not-told',
    BALLOON,
    'if (diff !== 0) this.#guest.driver.writeConfig32(BALLOON_CFG_ACTUAL, w[T_BALLOON + V_NR_PAGES]);',
    '',
    'the driver MUST update actual',
    DRIVER_TEST,
  ),
  fault(
    'oom-frees-first',
    BALLOON,
    '      this.#adjustManaged(pfn, 1);\n      this.#alloc.free(pfn, 0);',
    '      this.#alloc.free(pfn, 0);',
    'MemTotal does not grow back',
    DRIVER_TEST,
  ),
  fault(
    'report-below-watermark',
    BUDDY,
    '    if (w[zone + Z_FREE] - (1 << order) < w[zone + Z_MIN]) return false;\n',
    '',
    'L35: isolation below the min watermark',
    ALLOC_TEST,
  ),

  fault(
    'due-after-request',
    'packages/guest-kernel/src/drivers/reporting.ts',
    '    this.#dueInTwoSeconds();\n    Atomics.compareExchange(this.#w, T_REPORTING + R_STATE, IDLE, REQUESTED);\n',
    '    Atomics.compareExchange(this.#w, T_REPORTING + R_STATE, IDLE, REQUESTED);\n    this.#w[T_REPORTING + R_DUE_MS] = Math.ceil((this.#vcpu.clock + PAGE_REPORTING_DELAY) / NS_PER_MS);\n',
    'memory model: the time is stored after the request is published (found by fuzzing)',
    props('reporting'),
  ),

  // ── Page cache and write-back ──
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

  // ── Virtqueues ──
  fault(
    'avail-before-desc',
    DRIVER_QUEUE,
    '    const head = s[this.#base + S_FREE_HEAD];\n    let index = head;\n',
    '    const head = s[this.#base + S_FREE_HEAD];\n    let index = head;\n    this.#pushAvail(memory, head);\n    this.publish(memory);\n    s[this.#base + S_AVAIL] = (s[this.#base + S_AVAIL] + 0xffff) & 0xffff;\n',
    'I21: published before it is written',
    props('queue'),
  ),
  fault(
    'event-dekker-driver',
    DRIVER_QUEUE,
    '    Atomics.store(memory.u16, (memory.at + AVAIL_IDX) >> 1, idx);\n    s[this.#base + S_PUBLISHED] = idx;\n    return this.needsKick(memory);',
    '    s[this.#base + S_PUBLISHED] = idx;\n    const kick = this.needsKick(memory);\n    this.#window(memory, this.rings.driver, availBytes(this.size));\n    Atomics.store(memory.u16, (memory.at + AVAIL_IDX) >> 1, idx);\n    return kick;',
    'I24: the event is read before the index is stored',
    props('queue'),
  ),
  fault(
    'device-no-recheck',
    DEVICE_QUEUE,
    '    return this.hasAvail();\n',
    '    return false;\n',
    'I24: kicks armed without another look',
    props('queue'),
  ),
  fault(
    'driver-no-recheck',
    DRIVER_QUEUE,
    '    return this.hasUsed(memory);\n',
    '    return false;\n',
    'I24: interrupts armed without another look',
    props('queue'),
  ),
  fault(
    'need-event-wrap',
    'packages/virtio/src/uapi/virtio.ts',
    'return ((newIndex - event - 1) & 0xffff) < ((newIndex - oldIndex) & 0xffff);',
    'return newIndex - event - 1 < newIndex - oldIndex && event < newIndex;',
    'I21: event comparison breaks at the wrap',
    test('virtio/'),
  ),
  fault(
    'chain-unbounded',
    DEVICE_QUEUE,
    'if (count >= limit || chain.segments >= size) {',
    'if (count >= 1_000_000) {',
    'hang bound: a descriptor loop',
    BAD_RINGS,
  ),
  fault(
    'nested-indirect',
    DEVICE_QUEUE,
    "    if (nested) return { kind: 'indirect-nested' };\n",
    '',
    'malformed: indirect inside indirect',
    BAD_RINGS,
  ),
  fault(
    'next-unchecked',
    DEVICE_QUEUE,
    '        if (index < limit) continue;\n',
    '        if (index < 65536) continue;\n',
    'malformed: next beyond the table',
    BAD_RINGS,
  ),
  fault(
    'head-unchecked',
    DEVICE_QUEUE,
    "    if (head >= this.size) return this.#fail({ kind: 'head-out-of-range', head });\n",
    '',
    'malformed: a head beyond the queue',
    BAD_RINGS,
  ),
  fault(
    'index-jump-believed',
    DEVICE_QUEUE,
    '    if (n > this.size) {\n',
    '    if (n > 65536) {\n',
    'malformed: the index jumps',
    BAD_RINGS,
  ),
  fault(
    'zero-length-taken',
    DEVICE_QUEUE,
    "    if (length === 0) return { kind: 'zero-length', gpa };\n",
    '',
    'malformed: zero length',
    BAD_RINGS,
  ),
  fault(
    'order-of-segments',
    DEVICE_QUEUE,
    "    if (!writable && chain.writableSegments > 0) return { kind: 'readable-after-writable', index };\n",
    '',
    'malformed: readable after writable',
    BAD_RINGS,
  ),
  fault(
    'used-id-believed',
    DRIVER_QUEUE,
    '    if (head < 0 || head >= this.size || s[this.#token + head] < 0) {\n',
    '    if (head < 0 || head >= this.size) {\n',
    'a device returns what is not out',
    test('virtio/'),
  ),
  fault(
    'dma-after-push',
    BLOCK_DEVICE,
    '        queue.push(chain, written + 1);\n',
    '        queue.push(chain, written + 1);\n        chain.write(0, new Uint8Array(1));\n',
    'I16: bytes touched after the buffer was returned',
    props('cache'),
  ),
  fault(
    'reset-keeps-status',
    TRANSPORT,
    '    this.#interruptStatus = 0;\n',
    '',
    'a reset leaves an interrupt pending',
    test('virtio/src/conformance/mmio.test.ts'),
  ),
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
      'a block that leaves its list with PG_REPORTED still set: whoever takes it, and whatever list it goes back to, stores the flags word whole',
  },
  {
    name: 'detach-after-end',
    reason:
      'in MemFile.punchHoles the blocks are detached and the listeners told with no yield between: no task can run in between, and vCPUs resolve nothing themselves',
  },
  {
    name: 'second-yield-in-fault',
    reason:
      'without the yield between populating and locking, the fault is merely less often interrupted; the retry check under the lock does not depend on it',
  },
];
