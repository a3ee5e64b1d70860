/** What both sides of a guest property know: its shape, its options, and the words of the model they share. */
import { LINUX_HOTPLUG, type GuestConfig } from '@ebb/guest-kernel';
import type { MemoryProfile } from '@ebb/host-kvm';

export const PAGES = 1024;
/** Pages of a memory device's region, of a memory block, and of a sub-block. */
export const REGION_PAGES = 2048;
export const SECTION = 1024;
export const SUB_BLOCK = 512;
/** Pages of each vCPU's one file. */
export const FILE_PAGES = 6;
/** The last of them is written and dropped from the cache, never read: what it holds is nobody's promise. */
export const KEPT_PAGES: number = FILE_PAGES - 1;
/** With a disk, the guest starts with this many pages free, so that reclaim has work. */
export const FREE_AT_START = 100;
/** The process that both vCPUs run in, and pages of each. */
export const SHARED_PROCESS = 0;
export const AREA_PAGES = 8;

export interface GuestKind {
  readonly features: readonly number[] | null;
  readonly disk: boolean;
  /** A memory device whose region follows boot memory. */
  readonly memory?: MemoryProfile;
  /** Processes, one of them shared by the vCPUs. */
  readonly processes?: boolean;
  readonly reportingOrder: number;
  readonly cpu: readonly string[];
  readonly host: readonly string[];
}

/** Nearly all memory is in use from the start, so that the cache is reclaimed; a region that goes is pressure enough. */
export function fillsMemory(kind: GuestKind): boolean {
  return kind.disk && kind.memory === undefined;
}

export function guestConfig(kind: GuestKind, vcpus: number): GuestConfig {
  return {
    e820: [{ start: 0, end: PAGES }],
    nodes: [{ start: 0, end: PAGES }],
    maxPfn: pagesOf(kind),
    ...(kind.memory === undefined
      ? {}
      : {
          hotplug: {
            ...LINUX_HOTPLUG,
            devices: 1,
            sectionPages: SECTION,
            // Where pages are to move, nothing that cannot may be in their way.
            policy: kind.disk || kind.processes === true ? ('online_movable' as const) : ('online' as const),
          },
        }),
    nrCpus: vcpus,
    cpuNode: new Array<number>(vcpus).fill(0),
    // A range that is unplugged would be zeroed page by page: thousands of points that no fault hides behind.
    initOnAlloc: kind.memory === undefined,
    pagePoison: false,
    balloon: kind.features !== null,
    reportingOrder: kind.reportingOrder,
    blk: kind.disk,
    blocks: { kind: 'linear', pagesPerFile: FILE_PAGES },
  };
}

export function pagesOf(kind: GuestKind): number {
  return kind.memory === undefined ? PAGES : PAGES + REGION_PAGES;
}

/** Model words: 0 is set when the guest has ended in order; then the version of each file page. */
export const OPS_DONE = 8;
/** Pages allocated once the guest is up, and those that each vCPU still holds at the end. */
export const ALLOCATED_AT_START = 10;
export const HELD_AT_END = 11;
/** Host commands not yet given. */
export const COMMANDS = 9;
/** 1 once there is a process that both vCPUs run in. */
export const PROCESSES_ON = 13;
/** 1 once vCPU 0 has booted the guest and set it up: its atomic store pairs with the other vCPU's load. */
export const SET_UP = 14;
export const ALL_DONE = 1 << 20;

export function versionWord(cpu: number, index: number): number {
  return 16 + cpu * FILE_PAGES + index;
}
export function pattern(cpu: number, index: number, version: number, word: number): number {
  return (Math.imul(version, 0x9e3779b1) ^ (cpu << 24) ^ (index << 16) ^ Math.imul(word, 0x85ebca6b)) | 1;
}
