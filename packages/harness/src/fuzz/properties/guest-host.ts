/** The host of a guest property: devices that discard, commands that arrive while the guest is busy, and the verdict at the end. */
import {
  Arena,
  filePages,
  LINE_BALLOON,
  LINE_BLK,
  LINE_MEM,
  memoryOutcome,
  PLUGGED_SHIFT,
  Z_FREE,
  Z_LOW,
  zoneBases,
} from '@ebb/guest-kernel';
import {
  BalloonDevice,
  BlockDevice,
  MemoryDevice,
  type DevicePort,
  wholeRegion,
  type MemoryProfile,
  type TaskBody,
  type Vm,
} from '@ebb/host-kvm';
import { assert, PAGE_SIZE } from '@ebb/machine';
import { attachDevice } from '../attach-device.ts';
import {
  addedBlocks,
  allocatedPages,
  auditGuest,
  balloonPages,
  pageInUse,
  pagesInUseWithin,
} from '../guest-audit.ts';
import type { HostLab } from '../host-lab.ts';
import type { FuzzProgram, Op, Verdict } from '../property.ts';
import {
  ALLOCATED_AT_START,
  COMMANDS,
  FILE_PAGES,
  fillsMemory,
  type GuestKind,
  HELD_AT_END,
  KEPT_PAGES,
  OPS_DONE,
  PAGES,
  pagesOf,
  pattern,
  REGION_PAGES,
  SECTION,
  SUB_BLOCK,
  versionWord,
} from './guest-model.ts';

export function guestHost(kind: GuestKind, lab: HostLab, program: FuzzProgram): Verdict {
  const [{ vm }] = lab.vms;
  const port: DevicePort = {
    spawn: (name, body) => lab.spawn(name, body),
    now: () => vm.kickTime,
    costs: vm.costs,
  };
  let balloon: BalloonDevice | null = null;
  if (kind.features !== null) {
    balloon = new BalloonDevice({
      port,
      features: kind.features,
      memory: {
        ramPages: PAGES,
        endPfn: pagesOf(kind),
        unitPages: 1,
        discard: (runs, n) => vm.discard(runs, n),
      },
    });
    attachDevice(lab, vm, LINE_BALLOON, balloon);
  }
  const memory = kind.memory === undefined ? null : attachMemory(lab, vm, port, kind.memory);
  const disk = new Uint8Array(lab.shape.vcpus * FILE_PAGES * 4096);
  if (kind.disk) {
    const storage = {
      bytes: disk.length,
      read: (offset: number, out: Uint8Array) => out.set(disk.subarray(offset, offset + out.length)),
      write: (offset: number, bytes: Uint8Array) => disk.set(bytes, offset),
      flush: () => undefined,
    };
    attachDevice(lab, vm, LINE_BLK, new BlockDevice(storage, port));
  }
  // A guest whose memory is all in use at the start has touched it: two thousand hand-overs before the search begins.
  if (fillsMemory(kind)) assert(vm.preFault(0, PAGES), 'the host has frames for all of a guest');
  lab.model[COMMANDS] = program.host.length;
  program.host.forEach((op, i) => lab.spawn(`${op.op} ${i}`, hostTask(vm, balloon, memory, op, lab.model)));
  return () => {
    const found: string[] = [];
    if (lab.model[0] === 0) return found;
    const arena = new Arena(lab.arena(0), pagesOf(kind));
    found.push(...auditGuest(arena, lab.shape.vcpus));
    let expected = lab.model[ALLOCATED_AT_START] + filePages(arena);
    for (let cpu = 0; cpu < lab.shape.vcpus; cpu++) expected += lab.model[HELD_AT_END + cpu];
    if (memory !== null) expected += addedBlocks(arena, SECTION) * (SECTION / 64);
    const allocated = allocatedPages(arena);
    // What the shared process still maps is its own affair.
    if (allocated !== expected && kind.processes !== true)
      found.push(`leak: ${allocated} pages are allocated, their owners know of ${expected} (I19)`);
    if (balloon !== null) found.push(...balloonVerdict(arena, balloon));
    if (memory !== null) found.push(...memoryVerdict(arena, memory));
    if (kind.disk) found.push(...diskVerdict(lab, disk));
    return found;
  };
}

/** A memory device behind boot memory. What it takes away must be nobody's in the guest (I20). */
function attachMemory(lab: HostLab, vm: Vm, port: DevicePort, profile: MemoryProfile): MemoryDevice {
  const arena = new Arena(lab.arena(0), PAGES + REGION_PAGES);
  const whole = wholeRegion(vm, PAGE_SIZE);
  const device = new MemoryDevice({
    port,
    id: 'vm0',
    addr: PAGES * PAGE_SIZE,
    regionBytes: REGION_PAGES * PAGE_SIZE,
    blockBytes: SUB_BLOCK * PAGE_SIZE,
    node: 0,
    // Plugged at once, so that there is something to take away.
    requestedBytes: REGION_PAGES * PAGE_SIZE,
    profile,
    region: {
      ...whole,
      discard: (first, count) => {
        const user = pageInUse(arena, first, count);
        if (user >= 0)
          lab.found.push(`unplugged: page ${user} goes while the guest has it on a list or in use (I20)`);
        return whole.discard(first, count);
      },
    },
  });
  vm.addGate(device.unplugged);
  attachDevice(lab, vm, LINE_MEM, device);
  return device;
}

function* hostTask(
  vm: Vm,
  balloon: BalloonDevice | null,
  memory: MemoryDevice | null,
  op: Op,
  model: Int32Array,
): TaskBody {
  // Commands arrive while the guest is busy, not before.
  if (model[OPS_DONE] < op.b) yield () => model[OPS_DONE] >= op.b;
  switch (op.op) {
    case 'target':
      balloon?.setTarget((PAGES - (op.a % 48) * 8) * 4096);
      break;
    case 'resize':
      // Every other time nothing is left of it.
      memory?.setRequested((op.a % 2) * (1 + (op.b % (REGION_PAGES / SUB_BLOCK))) * SUB_BLOCK * PAGE_SIZE);
      break;
    case 'busy':
      if (memory === null) break;
      memory.busy = true;
      for (let i = 0; i < 10; i++) yield undefined;
      memory.busy = false;
      break;
    case 'stats':
      balloon?.requestStats();
      break;
    case 'hint':
      if (balloon?.startHinting() !== true) break;
      for (let i = 0; i < 10; i++) yield undefined;
      balloon.stopHinting();
      break;
    case 'interrupt':
      vm.vcpus.interrupt(op.a % 3);
      break;
  }
  // Only now: a guest that has seen the last command has been told of it.
  model[COMMANDS]--;
}

/** Both books of the region agree, and the size is reached, or the guest has said why not (I20, I24). */
function memoryVerdict(arena: Arena, device: MemoryDevice): string[] {
  const found: string[] = [];
  for (let b = 0; b < REGION_PAGES / SUB_BLOCK; b++) {
    const bit = (PAGES + b * SUB_BLOCK) >>> PLUGGED_SHIFT;
    const guest = ((arena.w[arena.layout.plugged + (bit >>> 5)] >>> (bit & 31)) & 1) !== 0;
    if (guest !== device.plugged.has(b))
      found.push(
        `plugged: block ${b} is ${guest ? '' : 'not '}plugged for the driver, the device differs (I20)`,
      );
  }
  const used = pagesInUseWithin(arena, PAGES, REGION_PAGES, (pfn) =>
    device.plugged.has(Math.floor((pfn - PAGES) / SUB_BLOCK)),
  );
  if (used >= 0) found.push(`unplugged: page ${used} is in use, its block is not plugged (I20)`);
  if (device.pluggedBytes !== device.plugged.count() * device.blockBytes)
    found.push(`plugged_size ${device.pluggedBytes} is not ${device.plugged.count()} blocks`);
  const last = memoryOutcome(arena, 0);
  if (last === 'EINVAL') found.push('protocol: the driver gave the device up (I24)');
  if (device.pluggedBytes !== device.requestedBytes && last === 'ok')
    found.push(
      `liveness: ${device.pluggedBytes} bytes are plugged of ${device.requestedBytes}, and the driver is content (I24)`,
    );
  return found;
}

/** Liveness: the balloon has reached its target, or has no page it could take. */
function balloonVerdict(arena: Arena, balloon: BalloonDevice): string[] {
  const pages = balloonPages(arena);
  const spare = zoneBases(arena.w).reduce((s, z) => s + arena.w[z + Z_FREE] - arena.w[z + Z_LOW], 0);
  const found: string[] = [];
  if (pages > balloon.numPages)
    found.push(`liveness: the balloon holds ${pages} pages, its target is ${balloon.numPages} (I24)`);
  if (pages < balloon.numPages && spare > 64)
    found.push(
      `liveness: the balloon stopped at ${pages} of ${balloon.numPages} pages with ${spare} to spare (I24)`,
    );
  const book = balloon.ballooned.count();
  if (book !== pages) found.push(`balloon books: the device counts ${book} pages, the driver ${pages}`);
  return found;
}

/** After a sync the disk holds the newest version of every page written. */
function diskVerdict(lab: HostLab, disk: Uint8Array): string[] {
  const words = new Int32Array(disk.buffer);
  const found: string[] = [];
  for (let cpu = 0; cpu < lab.shape.vcpus; cpu++) {
    for (let index = 0; index < KEPT_PAGES; index++) {
      const version = lab.model[versionWord(cpu, index)];
      const have = words[(cpu * FILE_PAGES + index) * 1024 + 7];
      const want = version === 0 ? 0 : pattern(cpu, index, version, 7);
      if (have !== want)
        found.push(
          `model disk: page ${index} of file ${cpu} is not its version ${version} after the last sync`,
        );
    }
  }
  return found;
}
