/** A vCPU's ways to memory beside the same loops over the raw typed array. */
import { type Gfn, gfn, GiB, PAGE_SIZE, Prng, type Vcpu } from '@ebb/machine';
import { smallMachine } from '../run/small-machine.ts';
import { timed } from './timed.ts';

export interface AccessFigures {
  /** Ratios, vCPU ÷ raw typed array (1 is as fast). */
  readonly runs: number;
  readonly word: number;
  readonly random: number;
  readonly copy: number;
}

let accessVcpu: Vcpu | null = null;
let accessRaw: Int32Array | null = null;

/** vCPU access to 1 GiB (huge pages, gate on) against the same loop over the raw typed array, in one run. */
export function access(): AccessFigures {
  const pages = GiB / PAGE_SIZE;
  if (accessVcpu === null) {
    const machine = smallMachine({ ramBytes: GiB, huge: 'always' });
    accessVcpu = machine.vms[0].vcpu(18);
    accessRaw = machine.memory.i32;
    accessVcpu.enterGuest();
    for (let p = 0; p < pages; p++) accessVcpu.store32(gfn(p), 0, p);
  }
  const vcpu = accessVcpu;
  const raw = accessRaw as Int32Array;
  const count = 1_000_000;
  const order = new Int32Array(count);
  const random = new Prng(5);
  for (let i = 0; i < count; i++) order[i] = random.below(pages * 1024);
  const from = new Uint8Array(PAGE_SIZE).fill(3);
  const flat = new Uint8Array(raw.buffer, 0, GiB);
  // Turn and turn about in short slices, best of each: a neighbour on the machine then spoils neither side alone.
  const best = { raw: Infinity, runs: Infinity, word: Infinity, rawRandom: Infinity, random: Infinity };
  const copies = { raw: Infinity, guest: Infinity };
  const slice = 4096;
  for (let round = 0; round < 12; round++) {
    const words = slice * 1024;
    best.raw = Math.min(
      best.raw,
      timed(words, () => rawSequential(raw, words)),
    );
    best.runs = Math.min(
      best.runs,
      timed(words, () => vcpuRuns(vcpu, slice)),
    );
    best.word = Math.min(
      best.word,
      timed(words, () => vcpuSequential(vcpu, slice)),
    );
    best.rawRandom = Math.min(
      best.rawRandom,
      timed(count, () => rawScatter(raw, order)),
    );
    best.random = Math.min(
      best.random,
      timed(count, () => void vcpu.scatter32(order, order, 0, count)),
    );
    copies.raw = Math.min(
      copies.raw,
      timed(slice, () => {
        for (let p = 0; p < slice; p++) flat.set(from, p * PAGE_SIZE);
      }),
    );
    copies.guest = Math.min(
      copies.guest,
      timed(slice, () => {
        for (let p = 0; p < slice; p++) {
          vcpu.window(p * PAGE_SIZE, PAGE_SIZE, true);
          vcpu.u8.set(from, vcpu.at);
        }
      }),
    );
  }
  return {
    runs: best.raw / best.runs,
    word: best.raw / best.word,
    random: best.rawRandom / best.random,
    copy: copies.raw / copies.guest,
  };
}

// Page by page, each a function of its own: V8 then compiles it whole, not from the middle of a loop that runs already, which
// comes out well or badly by chance.

function rawSequential(raw: Int32Array, words: number): void {
  for (let at = 0; at < words; at += 1024) rawPage(raw, at);
}
function rawPage(raw: Int32Array, at: number): void {
  for (let w = 0; w < 1024; w++) raw[at + w] = w;
}
function vcpuRuns(vcpu: Vcpu, pages: number): void {
  for (let p = 0; p < pages; p++) {
    vcpu.window(p * PAGE_SIZE, PAGE_SIZE, true);
    const { i32 } = vcpu;
    const at = vcpu.at >> 2;
    for (let w = 0; w < 1024; w++) i32[at + w] = w;
  }
}
function vcpuSequential(vcpu: Vcpu, pages: number): void {
  for (let p = 0; p < pages; p++) storePage(vcpu, gfn(p));
}
function storePage(vcpu: Vcpu, page: Gfn): void {
  for (let w = 0; w < 1024; w++) vcpu.store32(page, w, w);
}
function rawScatter(raw: Int32Array, order: Int32Array): void {
  for (let i = 0; i < order.length; i++) raw[order[i]] = order[i];
}
