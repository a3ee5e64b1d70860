/**
 * Guest memory under churn: vCPUs load and store while the host discards ranges and replaces slots. The model knows for
 * each word what may be there: what its one writer stored last, and 0 if its page was discarded since.
 *
 * A stored value names VM, vCPU, page and a sequence number, so a foreign value is told from an old one.
 */
import type { TaskBody, Vm } from '@ebb/host-kvm';
import { gfn, PAGE_SIZE, VmKilled } from '@ebb/machine';
import * as fc from 'fast-check';
import type { HostLab } from '../host-lab.ts';
import type { VcpuLab } from '../vcpu-lab.ts';
import type { LabShape } from '../lab.ts';
import type { FuzzProgram, Op, Property } from '../property.ts';

const PAGES = 6;
const WORDS = 2;
/** Model word in which the vCPUs count their operations: host tasks begin when a given number is done. */
const OPS_DONE = 0;
/** Model word: changes that the host has begun and not ended. */
const CHANGING = 1;
const ALL_DONE = 1 << 20;

/** Mostly one of two pages, so that vCPUs and host meet. */
const hot = (pages: number): fc.Arbitrary<number> =>
  fc.oneof(
    { weight: 2, arbitrary: fc.nat({ max: 1 }) },
    { weight: 1, arbitrary: fc.nat({ max: pages - 1 }) },
  );

/** Operations of a vCPU that checks what it reads. */
export const memoryOps: fc.Arbitrary<Op> = fc.record({
  op: fc.constantFrom(
    'store',
    'store',
    'update',
    'update',
    'update',
    'load',
    'load',
    'load',
    'fill',
    'exit',
    'slice',
    'scatter',
    'poll',
    'rest',
  ),
  a: hot(PAGES),
  b: fc.nat({ max: WORDS - 1 }),
});
const hostOps = (slots: boolean): fc.Arbitrary<Op> =>
  fc.record({
    op: fc.constantFrom('discard', 'discard', ...(slots ? ['slot', 'slot'] : [])),
    /** Low bit: which VM, of two; above: the page. */
    a: fc.tuple(hot(PAGES), fc.nat({ max: 1 })).map(([page, vm]) => 2 * page + vm),
    /** Low two bits: pages more than one; above: operations of the vCPUs to wait for. */
    b: fc.nat({ max: 4 * 32 - 1 }),
  });

function programs(shape: LabShape, slots: boolean): fc.Arbitrary<FuzzProgram> {
  return fc.record({
    host: fc.array(hostOps(slots), { minLength: 2, maxLength: 8 }),
    cpus: fc.tuple(
      ...Array.from({ length: shape.vms * shape.vcpus }, () =>
        fc.array(memoryOps, { minLength: 6, maxLength: 20 }),
      ),
    ),
  });
}

/** Model word of a page: odd while the host changes what is behind it, and moved by every such change. */
function pageWord(vm: number, page: number): number {
  return 16 + vm * 64 + page;
}

function hostTask(lab: HostLab, op: Op): TaskBody {
  const vmIndex = op.a % lab.shape.vms;
  const { vm, file } = lab.vms[vmIndex];
  const { model } = lab;
  const page = Math.floor(op.a / 2) % PAGES;
  const count = Math.min(1 + (op.b & 3), PAGES - page);
  const after = op.b >> 2;
  const change = function* (
    first: number,
    n: number,
    body: () => Generator<unknown, unknown, void>,
  ): TaskBody {
    if (model[OPS_DONE] < after) yield () => model[OPS_DONE] >= after;
    model[CHANGING]++;
    for (let p = first; p < first + n; p++) model[pageWord(vmIndex, p)] += 1 << 8;
    for (let p = first; p < first + n; p++) model[pageWord(vmIndex, p)]++;
    yield* body() as TaskBody;
    for (let p = first; p < first + n; p++) model[pageWord(vmIndex, p)]--;
    model[CHANGING]--;
  };
  if (op.op === 'slot') {
    const region = {
      slot: 0,
      flags: 0,
      guestPhysAddr: 0,
      memorySize: lab.shape.ramPages * PAGE_SIZE,
      file,
      fileOffset: 0,
    };
    return change(0, PAGES, () => replaceSlot(vm, region));
  }
  return change(page, count, function* () {
    yield* vm.discard(Int32Array.of(page, count), 1);
  });
}

function* replaceSlot(
  vm: Vm,
  region: Parameters<Vm['setUserMemoryRegion']>[0],
): Generator<unknown, void, void> {
  yield* vm.setUserMemoryRegion({ ...region, memorySize: 0 });
  yield undefined;
  yield* vm.setUserMemoryRegion(region);
}

/** One vCPU's words: what each may hold. */
class Cells {
  readonly #allowed = new Map<number, Set<number>>();
  readonly #seen = new Map<number, number>();
  readonly #lab: VcpuLab;
  readonly #vm: number;
  readonly #id: number;
  #sequence = 0;

  constructor(lab: VcpuLab, vm: number, id: number) {
    this.#lab = lab;
    this.#vm = vm;
    this.#id = id;
  }

  word(b: number): number {
    return this.#id * WORDS + b;
  }

  #state(page: number): number {
    return this.#lab.model[pageWord(this.#vm, page)];
  }

  /** A value of this vCPU for `page`; never 0. */
  next(page: number): number {
    this.#sequence++;
    return ((this.#vm + 1) << 28) | (this.#id << 26) | (page << 16) | this.#sequence;
  }

  /** Runs a store and notes what the word may hold after it. */
  store(page: number, word: number, value: number, act: () => void): void {
    const key = page * 1024 + word;
    const before = this.#state(page);
    act();
    const quiet = (before & 0xff) === 0 && this.#state(page) === before;
    const allowed = quiet ? new Set<number>() : this.#mayHold(page, word).add(0);
    allowed.add(value);
    this.#allowed.set(key, allowed);
    this.#seen.set(key, quiet ? before : -1);
  }

  #mayHold(page: number, word: number): Set<number> {
    const key = page * 1024 + word;
    const allowed = this.#allowed.get(key) ?? new Set([0]);
    // The page changed since: a hole reads as zero.
    if (this.#seen.get(key) !== this.#state(page)) allowed.add(0);
    return allowed;
  }

  check(page: number, word: number, act: () => number): void {
    const before = this.#state(page);
    const value = act();
    const allowed = this.#mayHold(page, word);
    const during = this.#state(page) !== before || (before & 0xff) !== 0;
    // While a slot is away its addresses are no memory: reads give all ones.
    if (allowed.has(value) || (during && (value === -1 || value === 0))) return;
    const names = [...allowed].map((v) => `0x${(v >>> 0).toString(16)}`).join(' or ');
    const foreign = value !== 0 && value >>> 28 !== this.#vm + 1;
    this.#lab.found.push(
      `${foreign ? 'foreign content (I1, I15)' : 'content'}: vCPU ${this.#vm}/${this.#id} read 0x${(value >>> 0).toString(16)} at gfn ${page} word ${word}; ` +
        `only ${names} was stored there`,
    );
  }
}

/** Runs them; what does not fit the model is found. */
export function runMemoryOps(lab: VcpuLab, ops: readonly Op[], vm: number, id: number): void {
  const { vcpu } = lab;
  const cells = new Cells(lab, vm, id);
  try {
    vcpu.enterGuest();
    for (const { op, a, b } of ops) {
      lab.model[OPS_DONE]++;
      lab.tellHost();
      const page = gfn(a % PAGES);
      const word = cells.word(b % WORDS);
      const value = cells.next(page);
      switch (op) {
        case 'store':
          cells.store(page, word, value, () => vcpu.store32(page, word, value));
          break;
        case 'load':
          cells.check(page, word, () => vcpu.load32(page, word));
          break;
        case 'update':
          // The load's fault leaves D clear, so the store's walk sets it, beside whoever clears the entry.
          cells.check(page, word, () => vcpu.load32(page, word));
          cells.store(page, word, value, () => vcpu.store32(page, word, value));
          break;
        case 'scatter':
          cells.store(page, word, value, () => {
            vcpu.scatter32(Int32Array.of((page << 10) | word), Int32Array.of(value), 0, 1);
          });
          break;
        case 'fill':
          cells.store(page, word, value, () => {
            if (vcpu.window(page * PAGE_SIZE + word * 4, 4, true)) vcpu.i32[vcpu.at >> 2] = value;
          });
          break;
        case 'exit':
          vcpu.mmioRead(0xfe_0000_0000, 4);
          break;
        case 'poll':
          // Waits for the host without leaving guest mode, as a spinning guest does: sections are all it offers.
          while (lab.model[CHANGING] > 0) {
            vcpu.beginSection();
            vcpu.port.relax();
          }
          break;
        case 'rest':
          // Outside, the host need not wait for this vCPU.
          vcpu.leaveGuest();
          while (lab.model[CHANGING] > 0) vcpu.port.relax();
          vcpu.enterGuest();
          break;
        case 'slice':
          vcpu.leaveGuest();
          vcpu.enterGuest();
          break;
      }
    }
    // All of them: what a vCPU was not awaited for shows when it goes on using what it had.
    for (let p = 0; p < PAGES; p++)
      for (let b = 0; b < WORDS; b++) cells.check(p, cells.word(b), () => vcpu.load32(gfn(p), cells.word(b)));
    vcpu.leaveGuest();
  } catch (error) {
    if (!(error instanceof VmKilled)) throw error;
  } finally {
    lab.model[OPS_DONE] += ALL_DONE;
    lab.tellHost();
  }
}

function memoryProperty(
  name: string,
  about: string,
  rows: string,
  shape: LabShape,
  slots: boolean,
): Property {
  return {
    name,
    about,
    rows,
    shape,
    steps: 800,
    program: programs(shape, slots),
    host(lab, program) {
      program.host.forEach((op, i) => lab.spawn(`${op.op} ${i}`, hostTask(lab, op)));
      return () => [];
    },
    cpu(lab, program, vm, id) {
      runMemoryOps(lab, program.cpus[vm * shape.vcpus + id], vm, id);
    },
  };
}

const SMALL = { hostPages: 96, ramPages: 16, huge: 'never' } as const;

export const invalidation: Property = memoryProperty(
  'invalidation',
  'two vCPUs of one VM load and store while the host discards under them',
  'I4 I17 I18 Y16 K26',
  { ...SMALL, vms: 1, vcpus: 2 },
  false,
);

export const isolation: Property = memoryProperty(
  'isolation',
  'two VMs share a host that takes frames from one and gives them to the other',
  'I1 I15',
  { ...SMALL, hostPages: 48, vms: 2, vcpus: 1 },
  false,
);

export const slots: Property = memoryProperty(
  'slots',
  'memory slots go and come back while vCPUs use them',
  'I11 I4',
  { ...SMALL, vms: 1, vcpus: 2 },
  true,
);
