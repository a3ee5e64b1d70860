/**
 * x86-64 page tables in guest RAM, as the kernel writes them and the hardware walks them (`GuestMmu`): tables of one page,
 * entries of 64 bits in two words. Counterpart: `mm/pgtable-generic.c`, `__pte_alloc`, `ptep_get_and_clear`.
 *
 * Readers need no lock: an entry is read as of one moment. Who changes one holds its process's page-table lock, against
 * others of the kernel; against the hardware, which sets A and D by itself, changes are exchanges.
 */
import * as machine from '@ebb/machine';
import { gfn, pteHigh, pteLow, ptePfn, ptIndex, spinLock, spinUnlock, type Vcpu } from '@ebb/machine';
import * as pageAlloc from './page-alloc.ts';
import { type PageAllocator } from './page-alloc.ts';
import * as zoneWords from './zone.ts';

// Local copies: docs/performance.md § Constants.
const { PTE_A, PTE_D, PTE_P, PTE_U, PTE_W, PT_LEVELS } = machine;
const { GFP_NORETRY } = pageAlloc;
const { MIGRATE_UNMOVABLE } = zoneWords;

/** Normal zone (H24). Allocated under the reverse-map lock too, which the OOM path may want: it is not called. */
const TABLE_GFP: number = 2 | GFP_NORETRY;

export class PageTables {
  readonly #vcpu: Vcpu;
  readonly #alloc: PageAllocator;
  readonly #words: Int32Array;
  readonly #relax: () => void;

  /** `words`: where the page-table locks lie. */
  constructor(vcpu: Vcpu, alloc: PageAllocator, words: Int32Array, relax: () => void) {
    this.#vcpu = vcpu;
    this.#alloc = alloc;
    this.#words = words;
    this.#relax = relax;
  }

  lock(word: number): void {
    spinLock(this.#words, word, this.#vcpu.id, this.#relax);
  }
  unlock(word: number): void {
    spinUnlock(this.#words, word);
  }

  // ── Tables ───────────────────────────────────────────────────────────────────────────────────────────────────────

  /** An empty table; −1 without memory. */
  newTable(): number {
    const pfn = this.#alloc.alloc(0, MIGRATE_UNMOVABLE, TABLE_GFP);
    if (pfn < 0) return -1;
    this.#alloc.unstamp(pfn);
    this.#vcpu.zeroPages(gfn(pfn), 1);
    return pfn;
  }

  /** Guest-physical address of the leaf entry of `vpn`; −1 if a table on the way is missing. */
  entry(root: number, vpn: number): number {
    let table = root;
    for (let level = PT_LEVELS; level > 1; level--) {
      const [low, high] = this.read(table * 4096 + ptIndex(vpn, level) * 8);
      if ((low & PTE_P) === 0) return -1;
      table = ptePfn(low, high);
    }
    return table * 4096 + ptIndex(vpn, 1) * 8;
  }

  /** The same, but makes the tables that are missing, each under the lock at `lockWord`; −1 without memory. */
  makeEntry(root: number, vpn: number, lockWord: number): number {
    let table = root;
    for (let level = PT_LEVELS; level > 1; level--) {
      const at = table * 4096 + ptIndex(vpn, level) * 8;
      const [low, high] = this.read(at);
      if ((low & PTE_P) !== 0) {
        table = ptePfn(low, high);
        continue;
      }
      // Memory first: an allocation may have to wait, and no spin lock is held then.
      const fresh = this.newTable();
      if (fresh < 0) return -1;
      this.lock(lockWord);
      const [again, againHigh] = this.read(at);
      if ((again & PTE_P) === 0) this.write(at, fresh, PTE_P | PTE_W | PTE_U);
      this.unlock(lockWord);
      if ((again & PTE_P) === 0) table = fresh;
      else {
        this.#alloc.free(fresh, 0);
        table = ptePfn(again, againHigh);
      }
    }
    return table * 4096 + ptIndex(vpn, 1) * 8;
  }

  /** Frees every table of an address space; what its leaves map is gone already. */
  freeAll(root: number): void {
    this.#freeTables(root, PT_LEVELS);
  }

  #freeTables(table: number, level: number): void {
    for (let index = 0; level > 1 && index < 512; index++) {
      const [low, high] = this.read(table * 4096 + index * 8);
      if ((low & PTE_P) !== 0) this.#freeTables(ptePfn(low, high), level - 1);
    }
    this.#alloc.free(table, 0);
  }

  // ── Entries ──────────────────────────────────────────────────────────────────────────────────────────────────────

  /** An entry as it is now: low and high word of one moment. */
  read(at: number): [low: number, high: number] {
    const vcpu = this.#vcpu;
    for (;;) {
      vcpu.window(at, 8, false);
      const word = vcpu.at >> 2;
      const low = Atomics.load(vcpu.i32, word);
      const high = Atomics.load(vcpu.i32, word + 1);
      if (Atomics.load(vcpu.i32, word) === low) return [low, high];
    }
  }

  /** Writes an entry: never present with the wrong page, so the low word goes first out and last in. */
  write(at: number, pfn: number, flags: number): void {
    const vcpu = this.#vcpu;
    vcpu.window(at, 8, true);
    const word = vcpu.at >> 2;
    Atomics.store(vcpu.i32, word, 0);
    Atomics.store(vcpu.i32, word + 1, pteHigh(pfn));
    Atomics.store(vcpu.i32, word, pteLow(pfn, flags));
  }

  /** Changes the flags of an entry; the hardware may have added A or D since it was read, which stay. */
  setFlags(at: number, seen: number, wanted: number): void {
    const vcpu = this.#vcpu;
    for (let low = seen; ; ) {
      vcpu.window(at, 8, true);
      const word = vcpu.at >> 2;
      const found = Atomics.compareExchange(vcpu.i32, word, low, wanted | (low & (PTE_A | PTE_D)));
      if (found === low) return;
      low = found;
    }
  }

  /** Empties an entry; the page it mapped, or −1. */
  clear(at: number): number {
    const vcpu = this.#vcpu;
    vcpu.window(at, 8, true);
    const word = vcpu.at >> 2;
    const high = Atomics.load(vcpu.i32, word + 1);
    const low = Atomics.exchange(vcpu.i32, word, 0);
    return (low & PTE_P) === 0 ? -1 : ptePfn(low, high);
  }

  /**
   * Makes an entry one that is not present and carries `flags` alone; the flags it had. By exchange: a D bit that the
   * hardware sets at the last moment is in what comes out.
   */
  replace(at: number, pfn: number, flags: number): number {
    const vcpu = this.#vcpu;
    vcpu.window(at, 8, true);
    return Atomics.exchange(vcpu.i32, vcpu.at >> 2, pteLow(pfn, flags)) & 0xfff;
  }
}
