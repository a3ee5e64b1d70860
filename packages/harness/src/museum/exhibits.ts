/**
 * The museum: bugs that people really had, each as a small run with a broken and a fixed profile. The broken one must show
 * the bug, the fixed one must not. Named by project and number; the stories are told in our own words. To add one: fifteen
 * lines here, ending in the access that goes wrong.
 */
import { BalloonDevice, FramePool, type DevicePort, type DiscardPort, type TaskYield } from '@ebb/host-kvm';
import { gfn, hfn, HUGE_PAGES, MiB, ownerOf, PAGE_SIZE, USE_RAM, type Hfn } from '@ebb/machine';
import type { FrameOrder } from '@ebb/memfs';
import { smallMachine, type SmallMachine } from '../run/small-machine.ts';
import type { Check } from '../scenarios/scenario.ts';
import { inflate } from './inflate.ts';
import { ZONE_COUNTS } from './zone-counts.ts';

export interface Exhibit {
  readonly name: string;
  readonly about: string;
  readonly rows: string;
  /** Shows the bug, or its absence; a check is ok when it is as the profile says. */
  show(broken: boolean): Check[];
}

const SECRET = 0x5ec4e7;
const RAM = 4 * MiB;

/** Stores `value` to word 0 of `count` pages from `first`. */
function touch(m: SmallMachine, vm: number, first: number, count: number, value: number): void {
  const vcpu = m.vms[vm].vcpu(8);
  vcpu.enterGuest();
  for (let p = first; p < first + count; p++) vcpu.store32(gfn(p), 0, value);
  vcpu.leaveGuest();
}

/** Punches blocks out of VM 0's memory file. */
function punch(m: SmallMachine, first: number, count: number): void {
  const holes = m.vms[0].file.punchHoles(Int32Array.of(first, count), 1);
  while (holes.next().done !== true) m.poll();
}

/** What an assertion of ours says to `act`; `fine` if nothing. */
function refusal(act: () => void): string {
  try {
    act();
    return 'fine';
  } catch (error) {
    return (error as Error).message;
  }
}

function check(what: string, value: number | string, ok: boolean): Check {
  return { what, value, ok };
}

function devicePort(m: SmallMachine): DevicePort {
  const { vm } = m.vms[0];
  return { spawn: (name, body) => void m.tasks.spawn(name, body), now: () => 0, costs: vm.costs };
}

/** A discard that frees nothing and says it freed all. */
function* claimed(runs: Int32Array, nrRuns: number): Generator<TaskYield, number, void> {
  yield undefined;
  let pages = 0;
  for (let r = 0; r < nrRuns; r++) pages += runs[2 * r + 1];
  return pages;
}

/** A pool that hands frames on with whatever is in them. */
class LeakyPool extends FramePool {
  override allocZeroed(order: FrameOrder, owner: number): number {
    if (owner !== ownerOf(0, USE_RAM) && owner !== ownerOf(1, USE_RAM))
      return super.allocZeroed(order, owner);
    const frame = this.buddy.alloc(order);
    if (frame >= 0) this.ledger.take(hfn(frame), 1 << order, owner);
    return frame;
  }
  override free(first: Hfn, count: number): void {
    this.ledger.release(first, count);
    this.buddy.freeRun(first, count);
  }
}

export const EXHIBITS: readonly Exhibit[] = [
  {
    name: 'firecracker-6167',
    about: 'a balloon whose discard reports success and frees nothing: the host never sees its memory again',
    rows: 'I9',
    show(broken) {
      const m = smallMachine({ ramBytes: RAM, huge: 'never' });
      touch(m, 0, 0, 256, 1);
      const before = m.vms[0].file.assigned;
      const memory: DiscardPort = {
        ramPages: RAM / PAGE_SIZE,
        unitPages: 1,
        discard: (runs, n) => (broken ? claimed(runs, n) : m.vms[0].vm.discard(runs, n)),
      };
      const device = new BalloonDevice({ port: devicePort(m), memory });
      inflate(
        m,
        device,
        Array.from({ length: 256 }, (_, p) => p),
      );
      const after = m.vms[0].file.assigned;
      return [
        check(
          'pages the guest gave up',
          device.counters.inflatedPages,
          device.counters.inflatedPages === 256,
        ),
        check('pages the host got back', before - after, broken ? after === before : after === 0),
      ];
    },
  },
  {
    name: 'shakenfist-3920',
    about:
      'memory that is free in the guest stays in the host, which swaps it out: shown as footprint, since there is no swap yet',
    rows: 'L1 L2',
    show(broken) {
      const m = smallMachine({ ramBytes: RAM, huge: 'never' });
      // The guest fills 512 pages and frees them all; only a report tells the host.
      touch(m, 0, 0, 512, 1);
      if (!broken) m.finish(m.vms[0].vm.discard(Int32Array.of(0, 512), 1));
      const held = m.vms[0].file.assigned;
      return [
        check('pages the host holds for a guest that uses none', held, broken ? held === 512 : held === 0),
      ];
    },
  },
  {
    name: 'firecracker-4988',
    about:
      'after a restore nobody listens to the memory file any more: pages are freed while the guest still maps them',
    rows: 'I4',
    show(broken) {
      const m = smallMachine({ ramBytes: RAM, huge: 'never' });
      const { vm, file } = m.vms[0];
      const vcpu = m.vms[0].vcpu(8);
      vcpu.enterGuest();
      vcpu.store32(gfn(5), 0, 1);
      if (broken) file.removeListener(vm);
      vcpu.leaveGuest();
      // Freeing a frame that is still mapped is where the ledger stops us; the fixed run goes on to the store.
      const refused = refusal(() => punch(m, 5, 1));
      vcpu.enterGuest();
      if (!broken) vcpu.store32(gfn(5), 0, 2);
      return [
        check('the ledger on freeing the frame', refused, broken ? refused !== 'fine' : refused === 'fine'),
      ];
    },
  },
  {
    name: 'cloud-hypervisor-5369',
    about:
      'a 4 KiB page number meets 2 MiB host pages: one page in the balloon costs its 511 neighbours their content',
    rows: 'I15',
    show(broken) {
      const m = smallMachine({ ramBytes: RAM, huge: 'hugetlb' });
      const { vm } = m.vms[0];
      touch(m, 0, 0, 8, SECRET);
      const device = new BalloonDevice({
        port: devicePort(m),
        memory: {
          ramPages: RAM / PAGE_SIZE,
          unitPages: broken ? 1 : HUGE_PAGES,
          // The bug: rounded outward to what the host can free.
          discard: (runs, n) => vm.discard(broken ? Int32Array.of(runs[0] & ~511, HUGE_PAGES) : runs, n),
        },
      });
      inflate(m, device, [3]);
      return neighbour(m, 4, broken);
    },
  },
  {
    name: 'qemu-partial-balloon-2019',
    about: 'a half-ballooned host page survives a reset: after the reboot one more page frees all of it',
    rows: 'I10 I15',
    show(broken) {
      const m = smallMachine({ ramBytes: RAM, huge: 'hugetlb' });
      const memory: DiscardPort = {
        ramPages: RAM / PAGE_SIZE,
        unitPages: HUGE_PAGES,
        discard: (runs, n) => m.vms[0].vm.discard(runs, n),
      };
      const device = new BalloonDevice({ port: devicePort(m), memory });
      inflate(
        m,
        device,
        Array.from({ length: 511 }, (_, p) => p),
      );
      // The guest reboots and uses those pages again; the device must forget what was in the balloon.
      if (!broken) device.reset();
      touch(m, 0, 0, 511, SECRET);
      inflate(m, device, [511]);
      return neighbour(m, 4, broken);
    },
  },
  {
    name: 'acrn-1825',
    about: "a dead VM's pages go to the next one with their content",
    rows: 'I1',
    show(broken) {
      const m = smallMachine({
        ramBytes: RAM,
        huge: 'never',
        vms: 2,
        pool: (options) => (broken ? new LeakyPool(options) : new FramePool(options)),
      });
      touch(m, 0, 0, 64, SECRET);
      m.finish(m.vms[0].vm.discard(Int32Array.of(0, RAM / PAGE_SIZE), 1));
      const vcpu = m.vms[1].vcpu(8);
      vcpu.enterGuest();
      let leaked = 0;
      for (let p = 0; p < 64; p++) if (vcpu.load32(gfn(p), 0) === SECRET) leaked++;
      return [check("pages of VM 0's that VM 1 reads", leaked, broken ? leaked > 0 : leaked === 0)];
    },
  },
  {
    name: 'mvm-3478',
    about: 'the driver counts only the queues it negotiated, the device counts all: reporting finds no queue',
    rows: 'formats §4.1',
    show(broken) {
      const m = smallMachine({ ramBytes: RAM, huge: 'never' });
      const device = new BalloonDevice({
        port: devicePort(m),
        memory: {
          ramPages: RAM / PAGE_SIZE,
          unitPages: 1,
          discard: (runs, n) => m.vms[0].vm.discard(runs, n),
        },
        features: [5],
        numbering: broken ? 'spec' : 'compact',
      });
      // Linux takes index 2 for reporting when there are neither statistics nor hinting.
      const size = device.queueMax[2] ?? 0;
      return [check('entries of queue 2, where the driver looks', size, broken ? size === 0 : size >= 32)];
    },
  },
  {
    name: 'kvm-a835429cda91',
    about: 'the zap loop yields in the middle of a range and forgets the flush it owes',
    rows: 'I4 I17',
    show(broken) {
      const m = smallMachine({ ramBytes: RAM, huge: 'never' });
      const { vm, file } = m.vms[0];
      const vcpu = m.vms[0].vcpu(8);
      vcpu.enterGuest();
      vcpu.store32(gfn(7), 0, 1);
      vcpu.leaveGuest();
      if (broken) {
        // First half: page 7 is zapped, a flush is owed. Yield. Second half: nothing mapped, so "no flush needed".
        vm.mmu.zapRange(0, 8);
        vm.mmu.zapRange(8, 8);
        vm.mmu.freeDetachedTables();
        file.removeListener(vm);
        punch(m, 0, 16);
      } else m.finish(vm.discard(Int32Array.of(0, 16), 1));
      vcpu.enterGuest();
      vcpu.store32(gfn(7), 0, 2);
      return stale(m, broken);
    },
  },
  {
    name: 'reporting-lock-2018',
    about:
      'L14: without the lock of the 2018 design a page is allocated while its report is under way, and loses its content',
    rows: 'L14 I3',
    show(broken) {
      const m = smallMachine({ ramBytes: RAM, huge: 'never' });
      const { vm } = m.vms[0];
      touch(m, 0, 9, 1, 1);
      // The report has left; the host has not answered yet.
      if (broken) touch(m, 0, 9, 1, SECRET);
      m.finish(vm.discard(Int32Array.of(9, 1), 1));
      if (!broken) touch(m, 0, 9, 1, SECRET);
      return neighbour(m, 9, broken);
    },
  },
  {
    name: 'rfc-2017-resize',
    about:
      'a slot is resized by delete and create while a vCPU uses it: the access in between finds no memory (the RFC’s random crashes)',
    rows: 'H52; I11',
    show(broken) {
      // The RFC's way; or with the vCPUs held out, and by one call that KVM does not have.
      return broken ? resized('naive', true) : [...resized('qemu', false), ...resized('extension', false)];
    },
  },
  ZONE_COUNTS,
];

/** A vCPU reads its own word while the slot that holds it gets another size. */
function resized(how: 'naive' | 'qemu' | 'extension', broken: boolean): Check[] {
  const m = smallMachine({ ramBytes: RAM, huge: 'never' });
  const [{ vm, file }] = m.vms;
  const region = { slot: 0, flags: 0, guestPhysAddr: 0, file, fileOffset: 0 };
  touch(m, 0, 3, 1, SECRET);
  const resize = vm.resizeSlot({ ...region, memorySize: RAM / 2 }, how);
  // Deleted and not yet back: the host has other things to do first. One call leaves no such moment.
  if (how !== 'extension') while (vm.slots.find(3) !== null) resize.next();
  m.tasks.spawn(
    'resize',
    (function* (): Generator<TaskYield, void, void> {
      for (let i = 0; i < 8; i++) yield undefined;
      yield* resize;
    })(),
  );
  const vcpu = m.vms[0].vcpu(8);
  vcpu.enterGuest();
  const found = vcpu.load32(gfn(3), 0);
  vcpu.leaveGuest();
  const missed = vm.counters.unclaimedMmio;
  while (m.tasks.step());
  return [
    check(`${how}: accesses that met no memory`, missed, missed > 0 === broken),
    check(`${how}: what the guest read of its own word`, found, (found === SECRET) !== broken),
    check(
      `${how}: changes of the memory map`,
      vm.slots.generation,
      vm.slots.generation >= (how === 'extension' ? 2 : 3),
    ),
  ];
}

/** The gate's verdict: a store through a translation whose frame is gone. */
function stale(m: SmallMachine, broken: boolean): Check[] {
  const n = m.log.count('stale-tlb') + m.log.count('use-after-free');
  return [check('stores into a frame the guest no longer has', n, broken ? n > 0 : n === 0)];
}

/** Whether page `page` of VM 0 still holds what its owner stored. */
function neighbour(m: SmallMachine, page: number, broken: boolean): Check[] {
  const vcpu = m.vms[0].vcpu(8);
  vcpu.enterGuest();
  const kept = vcpu.load32(gfn(page), 0) === SECRET;
  return [check(`page ${page} holds what its owner stored`, kept ? 'yes' : 'no', kept !== broken)];
}
