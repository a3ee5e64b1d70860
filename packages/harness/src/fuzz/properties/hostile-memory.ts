/**
 * A hostile guest on a memory device that the host resizes: requests of every kind, rewritten while they are served, access
 * to memory that is not plugged, device resets at any moment, system resets of both policies; beside an honest guest. An
 * independent model of the bitmap follows each answer. In the end no unplugged block has a frame, under the profiles that
 * promise so, and all books agree.
 */
import { LINE_MEM } from '@ebb/guest-kernel';
import {
  MEMORY_PROFILES,
  MemoryDevice,
  RegionSlots,
  wholeRegion,
  type DevicePort,
  type MemoryRequest,
  type TaskBody,
} from '@ebb/host-kvm';
import { PAGE_SIZE, VmKilled } from '@ebb/machine';
import * as fc from 'fast-check';
import { attachDevice } from '../attach-device.ts';
import type { HostLab } from '../host-lab.ts';
import type { LabShape } from '../lab.ts';
import type { Op, Property } from '../property.ts';
import {
  ASKED,
  BLOCK,
  BLOCKS,
  DONE,
  ENDED,
  guestOp,
  HostileMemoryGuest,
  OPS_DONE,
  POLICY,
  REGION,
} from './hostile-memory-guest.ts';
import { memoryOps, runMemoryOps } from './memory.ts';

const hostOp: fc.Arbitrary<Op> = fc.record({
  op: fc.constantFrom('resize', 'resize', 'busy'),
  a: fc.nat({ max: BLOCKS }),
  /** Operations of the guest to wait for. */
  b: fc.nat({ max: 20 }),
});
/** The first operation of the host chooses the device's profile. */
const profileOp: fc.Arbitrary<Op> = fc.record({
  op: fc.constant('profile'),
  a: fc.nat({ max: MEMORY_PROFILES.length - 1 }),
  b: fc.constant(0),
});

const shape: LabShape = {
  hostPages: 160,
  ramPages: REGION + BLOCKS * BLOCK,
  vms: 2,
  vcpus: 1,
  huge: 'never',
};

/** What the answers say the bitmap is, by a model of its own. */
class BitmapModel {
  readonly found: string[] = [];
  plugged = new Set<number>();

  answered({ type, addr, nbBlocks, response }: MemoryRequest): void {
    const first = (addr / PAGE_SIZE - REGION) / BLOCK;
    const blocks = Array.from({ length: Math.min(nbBlocks, BLOCKS + 1) }, (_, i) => first + i);
    const inside = Number.isInteger(first) && first >= 0 && nbBlocks > 0 && first + nbBlocks <= BLOCKS;
    const all = (plugged: boolean): boolean => blocks.every((b) => this.plugged.has(b) === plugged);
    const say = (what: string): void =>
      void this.found.push(
        `model: ${type} of ${nbBlocks} at block ${first} is ${response}: ${what} (5.15.6)`,
      );
    if (response !== 'ACK') return;
    if (type !== 'UNPLUG_ALL' && !inside) say('outside the region');
    if (type === 'PLUG') {
      if (!all(false)) say('some are plugged');
      for (const b of blocks) this.plugged.add(b);
    } else if (type === 'UNPLUG') {
      if (!all(true)) say('some are not plugged');
      for (const b of blocks) this.plugged.delete(b);
    } else if (type === 'UNPLUG_ALL') this.plugged.clear();
  }
}

/** Serves system resets until the guest has ended. */
function* resets(
  lab: HostLab,
  device: MemoryDevice,
  resetTransport: () => void,
  bitmap: BitmapModel,
): TaskBody {
  const { model } = lab;
  for (;;) {
    yield () => Atomics.load(model, ASKED) !== model[DONE] || model[ENDED] !== 0;
    if (Atomics.load(model, ASKED) === model[DONE]) return;
    resetTransport();
    const policy = model[POLICY] === 0 ? 'virtio-1.2' : 'rfc-2017';
    // What a request began before is carried out first: the model hears of it only now.
    if (!device.idle) yield () => device.idle;
    const { size } = bitmap.plugged;
    yield* device.systemReset(policy);
    // I10: no holes, and not a block more or less.
    bitmap.plugged = new Set(Array.from({ length: policy === 'rfc-2017' ? size : 0 }, (_, b) => b));
    Atomics.store(model, DONE, Atomics.load(model, ASKED));
  }
}

function* hostTask(lab: HostLab, device: MemoryDevice, op: Op): TaskBody {
  const { model } = lab;
  if (model[OPS_DONE] < op.b) yield () => model[OPS_DONE] >= op.b || model[ENDED] !== 0;
  if (op.op === 'resize') device.setRequested(op.a * BLOCK * PAGE_SIZE);
  else {
    device.busy = true;
    for (let i = 0; i < 6; i++) yield undefined;
    device.busy = false;
  }
}

/** Books, and what stands behind unplugged blocks. */
function verdict(lab: HostLab, device: MemoryDevice, bitmap: BitmapModel): string[] {
  const { found } = bitmap;
  if (device.pluggedBytes !== device.plugged.count() * device.blockBytes)
    found.push(`plugged_size ${device.pluggedBytes} is not ${device.plugged.count()} blocks`);
  const enforces = device.profile === 'rfc-write-protect' || device.profile === 'inaccessible';
  const [{ file }] = lab.vms;
  for (let b = 0; b < BLOCKS; b++) {
    const plugged = device.plugged.has(b);
    if (plugged !== bitmap.plugged.has(b))
      found.push(`model: block ${b} is ${plugged ? '' : 'not '}plugged, the answers say otherwise (5.15.6)`);
    if (plugged || !enforces) continue;
    for (let p = REGION + b * BLOCK; p < REGION + (b + 1) * BLOCK; p++)
      if (file.bmap(p) >= 0) found.push(`unplugged: page ${p} of block ${b} has a frame (I2, H10)`);
  }
  return found;
}

/** Boot memory alone in the lab's slot, and a slot for each block of the region, which comes and goes with it. */
function slotPerBlock(lab: HostLab): RegionSlots {
  const [{ vm, file }] = lab.vms;
  const boot = { slot: 0, flags: 0, guestPhysAddr: 0, file, fileOffset: 0 };
  for (const memorySize of [0, REGION * PAGE_SIZE])
    for (const set = vm.setUserMemoryRegion({ ...boot, memorySize }); set.next().done !== true; );
  return new RegionSlots({
    vm,
    file,
    fileOffset: REGION,
    firstSlot: 1,
    baseGfn: REGION,
    nrPages: BLOCKS * BLOCK,
    slotPages: BLOCK,
  });
}

export const hostileMemory: Property = {
  name: 'hostile-memory',
  about: 'a hostile guest on a memory device that the host resizes, with resets of device and system',
  rows: 'I1 I2 I4 I9 I10 I15 I16 I17 H10 H11 H12 H32',
  shape,
  hostileRings: true,
  steps: 2500,
  program: fc.record({
    host: fc
      .tuple(profileOp, fc.array(hostOp, { minLength: 1, maxLength: 5 }))
      .map(([profile, ops]) => [profile, ...ops]),
    cpus: fc.tuple(
      fc.array(guestOp, { minLength: 8, maxLength: 40 }),
      fc.array(memoryOps, { minLength: 2, maxLength: 8 }),
    ),
  }),
  host(lab, program) {
    const [{ vm }] = lab.vms;
    const port: DevicePort = {
      spawn: (n, body) => lab.spawn(n, body),
      now: () => vm.kickTime,
      costs: vm.costs,
    };
    const bitmap = new BitmapModel();
    const [first, ...ops] = program.host;
    const profile = MEMORY_PROFILES[first?.a ?? 0];
    const device = new MemoryDevice({
      port,
      id: 'vm0',
      addr: REGION * PAGE_SIZE,
      regionBytes: BLOCKS * BLOCK * PAGE_SIZE,
      blockBytes: BLOCK * PAGE_SIZE,
      node: 0,
      requestedBytes: BLOCKS * BLOCK * PAGE_SIZE,
      profile,
      onRequest: (request) => bitmap.answered(request),
      region: profile === 'inaccessible' ? slotPerBlock(lab) : wholeRegion(vm, PAGE_SIZE),
    });
    vm.addGate(device.unplugged);
    const transport = attachDevice(lab, vm, LINE_MEM, device);
    ops.forEach((op, i) => lab.spawn(`${op.op} ${i}`, hostTask(lab, device, op)));
    lab.spawn(
      'resets',
      resets(lab, device, () => transport.reset(), bitmap),
    );
    return () => verdict(lab, device, bitmap);
  },
  cpu(lab, program, vm, id) {
    if (vm === 1) {
      runMemoryOps(lab, program.cpus[1], vm, id);
      return;
    }
    try {
      const guest = new HostileMemoryGuest(lab);
      lab.vcpu.enterGuest();
      guest.bringUp();
      for (const op of program.cpus[0]) {
        lab.model[OPS_DONE]++;
        lab.tellHost();
        guest.one(op);
      }
      lab.vcpu.leaveGuest();
    } catch (error) {
      if (!(error instanceof VmKilled)) throw error;
    } finally {
      lab.model[ENDED] = 1;
      lab.tellHost();
    }
  },
};
