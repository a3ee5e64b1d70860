/** The guest's allocator under load, locks, counters and shadow in; no page is touched. */
import {
  Arena,
  bootMemory,
  Buddy,
  freePages,
  MIGRATE_MOVABLE,
  PerCpuPages,
  zoneBases,
  type GuestConfig,
} from '@ebb/guest-kernel';
import { Prng, type Vcpu } from '@ebb/machine';
import { timed } from './timed.ts';

/** Pages one by one, freed in order or at random; or orders 0 to 3. */
export type Load = 'bulk' | 'random' | 'mixed';

const MAX_PFN = 131072;
const ROUNDS = 24;
// A local copy: docs/performance.md § Constants.
const MOVABLE = MIGRATE_MOVABLE;
const ORDERS = [0, 0, 0, 1, 0, 2, 3, 1];

/** A guest of 512 MiB, booted by `vcpu` so far that it allocates. */
export function bootAllocator(vcpu: Vcpu, nrCpus: number): SharedArrayBuffer {
  const config: GuestConfig = {
    e820: [{ start: 0, end: MAX_PFN }],
    nodes: [{ start: 0, end: MAX_PFN }],
    maxPfn: MAX_PFN,
    nrCpus,
    cpuNode: new Array<number>(nrCpus).fill(0),
    initOnAlloc: false,
    pagePoison: false,
    balloon: false,
    blk: false,
    blocks: { kind: 'linear', pagesPerFile: 1 },
  };
  const buffer = Arena.create(MAX_PFN);
  bootMemory(new Arena(buffer, MAX_PFN), vcpu, config);
  return buffer;
}

/**
 * Nanoseconds per operation, round by round, of a vCPU that takes `share` of seven tenths of memory and gives it back.
 * `together` returns when every vCPU of the benchmark has come to it.
 */
export function allocateAndFree(
  buffer: SharedArrayBuffer,
  vcpu: Vcpu,
  load: Load,
  share: number,
  together: () => void,
): number[] {
  const arena = new Arena(buffer, MAX_PFN);
  const zones = zoneBases(arena.w);
  const pcp = new PerCpuPages(arena, new Buddy(arena, vcpu), vcpu, zones);
  pcp.enter();
  const zone = zones.length - 1;
  const n = Math.floor(freePages(arena) * 0.7 * share);
  const held = new Int32Array(n);
  const random = new Prng(9);
  const rounds: number[] = [];
  for (let round = 0; round < ROUNDS; round++) {
    together();
    if (load === 'mixed') {
      let count = 0;
      const ns = timed(1, () => {
        count = takeMixed(pcp, zone, held, Math.floor(n / 2));
        giveMixed(pcp, zone, held, count);
      });
      rounds.push(ns / (2 * count));
      continue;
    }
    const alloc = timed(n, () => takePages(pcp, zone, held));
    if (load === 'random') {
      for (let i = n - 1; i > 0; i--) {
        const j = random.below(i + 1);
        const t = held[i];
        held[i] = held[j];
        held[j] = t;
      }
      together();
    }
    const free = timed(n, () => givePages(pcp, zone, held));
    rounds.push(load === 'random' ? free : (alloc + free) / 2);
  }
  pcp.leave();
  return rounds;
}

// The loops that are timed, as functions of their own: in a closure every variable they share is read again in each round.

/** Takes up to `most` blocks of mixed orders: how many there were. */
function takeMixed(pcp: PerCpuPages, zone: number, held: Int32Array, most: number): number {
  for (let i = 0; i < most; i++) {
    const pfn = pcp.alloc(zone, ORDERS[i & 7], MOVABLE);
    if (pfn < 0) return i;
    held[i] = pfn;
  }
  return most;
}
function giveMixed(pcp: PerCpuPages, zone: number, held: Int32Array, count: number): void {
  for (let i = 0; i < count; i++) pcp.free(zone, held[i], ORDERS[i & 7], MOVABLE);
}
function takePages(pcp: PerCpuPages, zone: number, held: Int32Array): void {
  for (let i = 0; i < held.length; i++) held[i] = pcp.alloc(zone, 0, MOVABLE);
}
function givePages(pcp: PerCpuPages, zone: number, held: Int32Array): void {
  for (let i = 0; i < held.length; i++) pcp.free(zone, held[i], 0, MOVABLE);
}
