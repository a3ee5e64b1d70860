/** Seeded faults. Reporting and balloon. */
import { fault, props, test, type Mutant } from '../mutant.ts';

const VM = 'packages/host-kvm/src/kvm/vm.ts';
const BALLOON_DEVICE = 'packages/host-kvm/src/devices/balloon.ts';
const BUDDY = 'packages/guest-kernel/src/mm/buddy.ts';
const BALLOON = 'packages/guest-kernel/src/drivers/balloon.ts';
const GUEST_QUEUE = 'packages/guest-kernel/src/drivers/virtio-guest.ts';
const VM_TEST = test('host-kvm/src/kvm/vm.test.ts');
const BALLOON_TEST = test('host-kvm/src/devices/balloon.test.ts');
const HOSTILE_TEST = test('host-kvm/src/devices/hostile-timing.test.ts');
const DRIVER_TEST = test('guest-kernel/src/drivers/balloon.conformance.test.ts');
const ALLOC_TEST = test('guest-kernel/src/mm/allocator.property.test.ts');

export const BALLOON_FAULTS: readonly Mutant[] = [
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
    'reported-first-in-line',
    BUDDY,
    'this.freeOne(zone, pfn, order, false, true);\n    if (reported',
    'this.freeOne(zone, pfn, order, false);\n    if (reported',
    'what the host has just taken is the first to be handed out',
    ALLOC_TEST,
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
    "if (id === this.hintCommandId && this.#hintState === 'requested') this.#hintState = 'start';",
    "if (this.#hintState === 'requested') this.#hintState = 'start';",
    'The device MUST ignore pages of a command ID that does not match',
    BALLOON_TEST,
  ),
  fault(
    'stale-id-keeps-round',
    BALLOON_DEVICE,
    "if (this.#hintState === 'start') this.#hintState = 'stop';",
    "if (this.#hintState === 'start' && id === FREE_PAGE_HINT_STOP) this.#hintState = 'stop';",
    'The device MUST ignore pages of a command ID that does not match, in the middle of a round as well',
    BALLOON_TEST,
  ),
  fault(
    'inflated-again-kept',
    BALLOON_DEVICE,
    'if (this.ballooned.add(pfn)) this.counters.inflatedPages++;',
    'if (!this.ballooned.add(pfn)) continue;\n      this.counters.inflatedPages++;',
    'a page that the guest touched and inflates again stays backed',
    BALLOON_TEST,
  ),
  fault(
    'long-inflate-holds-host',
    BALLOON_DEVICE,
    '      if (offset > 0) yield undefined;\n      cost +=',
    '      cost +=',
    'one buffer of a guest stops the host',
    HOSTILE_TEST,
  ),
  fault(
    'same-target-not-told',
    BALLOON_DEVICE,
    '    this.numPages = Math.floor((ramBytes - size) / 4096);\n',
    '    const pages = Math.floor((ramBytes - size) / 4096);\n    if (pages === this.numPages) return;\n    this.numPages = pages;\n',
    'after an OOM deflate the same target does not fill the balloon again',
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
    '    this.#adjustManaged(pfn, 1);\n    this.#alloc.free(pfn, 0);',
    '    this.#alloc.free(pfn, 0);',
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
    '      if (state === IDLE) this.#dueInTwoSeconds();\n      if (Atomics.compareExchange(this.#w, T_REPORTING + R_STATE, state, REQUESTED) === state) return;\n',
    '      if (Atomics.compareExchange(this.#w, T_REPORTING + R_STATE, state, REQUESTED) !== state) continue;\n      this.#w[T_REPORTING + R_DUE_MS] = Math.ceil((this.#vcpu.clock + PAGE_REPORTING_DELAY) / NS_PER_MS);\n      return;\n',
    'memory model: the time is stored after the request is published (found by fuzzing)',
    DRIVER_TEST,
  ),
  fault(
    'freed-during-a-pass',
    'packages/guest-kernel/src/drivers/reporting.ts',
    '      if (state === REQUESTED) return;\n',
    '      if (state !== IDLE) return;\n',
    'I24: memory freed during a pass is never reported',
    test('guest-kernel/src/drivers/balloon.conformance.test.ts'),
  ),
  fault(
    'stats-rearmed-blindly',
    BALLOON,
    '      } while (stats.enableInterrupts(this.#vcpu));\n',
    '      } while (stats.enableInterrupts(this.#vcpu) && false);\n',
    'I24: statistics asked for while the interrupt is armed never come',
    DRIVER_TEST,
  ),
  fault(
    'reports-what-is-poisoned',
    BALLOON,
    '...(poisonLost ? [VIRTIO_BALLOON_F_REPORTING] : []),\n',
    '...(poisonLost && false ? [VIRTIO_BALLOON_F_REPORTING] : []),\n',
    'L31: poison goes with what is reported (`virtballoon_validate`)',
    DRIVER_TEST,
  ),
  fault(
    'taken-interrupt-forgotten',
    'packages/guest-kernel/src/kernel.ts',
    '      if (taken || acpi?.pending === true) due = now;\n',
    '      if (acpi?.pending === true) due = now;\n',
    'I24: a target that comes with the last completion waits for the next window',
    DRIVER_TEST,
  ),
];
