/**
 * Processes: address spaces with anonymous memory, demand paging, fork with copy on write, exit; and the migration of a
 * page beneath all that map it. Counterpart: `mm/memory.c` (`do_anonymous_page`, `do_wp_page`, `copy_page_range`,
 * `zap_pte_range`), `mm/rmap.c`, `mm/migrate.c` (`try_to_migrate`, `remove_migration_ptes`, `migration_entry_wait`).
 *
 * References: each mapping of a page holds one. Reverse map: a page knows its page number in the address space, and every
 * process that shares it has it there, since sharing comes from fork alone; so its mappings are found by looking at that
 * number in every process. Simplified: one lock for all reverse maps, one area per process, 4 KiB pages.
 *
 * | lock | guards | order |
 * | --- | --- | --- |
 * | reverse map | which processes exist and what they share; held by fork, exit and migration | first |
 * | page table, per process | its leaf entries, against faults and each other; the hardware reads them without it | second |
 *
 * A move, in order: entries become migration entries; every vCPU forgets its translations; only then content is copied;
 * then entries name the new page. Who faults meanwhile waits for that.
 */
import {
  assert,
  gfn,
  GuestMmu,
  pteHigh,
  pteLow,
  ptePfn,
  ptIndex,
  PTE_A,
  PTE_D,
  PTE_MIGRATION,
  PTE_P,
  PTE_U,
  PTE_W,
  PT_LEVELS,
  spinLock,
  spinUnlock,
  type Vcpu,
} from '@ebb/machine';
import type { Arena } from '../arena.ts';
import { H_RMAP_LOCK, MAX_PROCESSES, PROCESS_BASE, PROCESS_WORDS } from '../layout.ts';
import { EV, eventRow } from './events.ts';
import { P_FLAGS, P_INDEX, P_REF, PG_ANON } from './page.ts';
import { GFP_NORETRY, type PageAllocator } from './page-alloc.ts';
import { TlbShootdown } from './shootdown.ts';
import { MIGRATE_MOVABLE, MIGRATE_UNMOVABLE } from './zone.ts';

/** Words of a process. */
const X_ALIVE = 0;
const X_ROOT = 1;
/** Pages of its one area. */
const X_PAGES = 2;
const X_LOCK = 16;

/** Highest zone: Movable for what processes hold, Normal for their page tables (H24). */
const USER_GFP = 3;
/** Allocated under the reverse-map lock too, which the OOM path may want: it is not called. */
const TABLE_GFP: number = 2 | GFP_NORETRY;

export class Processes {
  readonly mmu: GuestMmu;
  readonly shootdown: TlbShootdown;
  readonly #w: Int32Array;
  readonly #memmap: number;
  readonly #vcpu: Vcpu;
  readonly #alloc: PageAllocator;
  readonly #relax: () => void;
  readonly #events: number;
  readonly #zeroed: boolean;

  /** `inWait`: what this vCPU serves while it waits for another. */
  constructor(
    arena: Arena,
    vcpu: Vcpu,
    alloc: PageAllocator,
    nrCpus: number,
    initOnAlloc: boolean,
    inWait: () => void,
  ) {
    this.#zeroed = initOnAlloc;
    this.#w = arena.w;
    this.#memmap = arena.memmap;
    this.#vcpu = vcpu;
    this.#alloc = alloc;
    this.#events = eventRow(vcpu.id);
    this.mmu = new GuestMmu(vcpu);
    this.#relax = () => {
      this.shootdown.serve();
      inWait();
      vcpu.beginSection();
      vcpu.port.relax();
    };
    this.shootdown = new TlbShootdown(arena, vcpu, this.mmu, nrCpus, this.#relax);
  }

  #slot(id: number): number {
    return PROCESS_BASE + id * PROCESS_WORDS;
  }
  #lock(id: number): void {
    spinLock(this.#w, this.#slot(id) + X_LOCK, this.#vcpu.id, this.#relax);
  }
  #unlock(id: number): void {
    spinUnlock(this.#w, this.#slot(id) + X_LOCK);
  }
  #lockRmap(): void {
    spinLock(this.#w, H_RMAP_LOCK, this.#vcpu.id, this.#relax);
  }
  #unlockRmap(): void {
    spinUnlock(this.#w, H_RMAP_LOCK);
  }

  // ── Life ─────────────────────────────────────────────────────────────────────────────────────────────────────────

  /** A new process with an empty area of `pages`; its number, or −1 without memory or a free slot. */
  create(pages: number): number {
    this.#lockRmap();
    const id = this.#claim(pages);
    this.#unlockRmap();
    return id;
  }

  /** Under the reverse-map lock. */
  #claim(pages: number): number {
    const w = this.#w;
    for (let id = 0; id < MAX_PROCESSES; id++) {
      const slot = this.#slot(id);
      if (w[slot + X_ALIVE] !== 0) continue;
      const root = this.#newTable();
      if (root < 0) return -1;
      w[slot + X_ROOT] = root;
      w[slot + X_PAGES] = pages;
      w[slot + X_ALIVE] = 1;
      return id;
    }
    return -1;
  }

  /** A copy that shares every page; stores copy first. Its number, or −1. */
  fork(parent: number): number {
    const w = this.#w;
    this.#lockRmap();
    const pages = w[this.#slot(parent) + X_PAGES];
    const child = this.#claim(pages);
    for (let vpn = 0; child >= 0 && vpn < pages; vpn++) {
      const from = this.#entry(parent, vpn);
      if (from < 0) continue;
      const into = this.#makeEntry(child, vpn);
      if (into < 0) {
        this.shootdown.flushAll();
        this.#tearDown(child);
        this.#unlockRmap();
        return -1;
      }
      this.#lock(parent);
      const [low, high] = this.#read(from);
      if ((low & PTE_P) !== 0) {
        this.#setFlags(from, low, low & ~PTE_W);
        Atomics.add(w, this.#memmap + (ptePfn(low, high) << 4) + P_REF, 1);
        this.#write(into, ptePfn(low, high), (low & 0xfff & ~(PTE_W | PTE_D)) | PTE_P);
      }
      this.#unlock(parent);
    }
    // Nobody may go on storing through a translation from before: what the parent writes now, the child must not see.
    if (child >= 0) this.shootdown.flushAll();
    this.#unlockRmap();
    if (child >= 0) w[this.#events + EV.fork]++;
    return child;
  }

  /** Ends a process: its mappings go, then every translation, then its pages. Nobody runs in it any more. */
  exit(id: number): void {
    this.#lockRmap();
    this.#tearDown(id);
    this.#unlockRmap();
  }

  #tearDown(id: number): void {
    const w = this.#w;
    const slot = this.#slot(id);
    const freed: number[] = [];
    for (let vpn = 0; vpn < w[slot + X_PAGES]; vpn++) {
      const entry = this.#entry(id, vpn);
      if (entry < 0) continue;
      this.#lock(id);
      const pfn = this.#clear(entry);
      this.#unlock(id);
      if (pfn >= 0) freed.push(pfn);
    }
    this.shootdown.flushAll();
    for (const pfn of freed) this.#drop(pfn);
    this.#freeTables(w[slot + X_ROOT], PT_LEVELS);
    w[slot + X_ALIVE] = 0;
  }

  /** Gives the page at `vpn` up (`MADV_DONTNEED`): the next access finds zeros. */
  discard(id: number, vpn: number): void {
    const entry = this.#entry(id, vpn);
    if (entry < 0) return;
    for (;;) {
      this.#lock(id);
      const [low] = this.#read(entry);
      if ((low & PTE_MIGRATION) !== 0) {
        this.#unlock(id);
        this.#relax();
        continue;
      }
      const pfn = this.#clear(entry);
      this.#unlock(id);
      if (pfn < 0) return;
      this.shootdown.flushAll();
      this.#drop(pfn);
      return;
    }
  }

  /** Drops a mapping's reference; the page is free with the last. */
  #drop(pfn: number): void {
    const page = this.#memmap + (pfn << 4);
    if (Atomics.sub(this.#w, page + P_REF, 1) !== 1) return;
    this.#w[page + P_REF] = 1;
    Atomics.and(this.#w, page + P_FLAGS, ~PG_ANON);
    this.#alloc.free(pfn, 0);
  }

  // ── Access ───────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Loads a word of a process's memory; undefined when there is no memory for it. */
  load32(id: number, vpn: number, word: number): number | undefined {
    const pfn = this.#touch(id, vpn, false);
    return pfn < 0 ? undefined : this.#vcpu.load32(gfn(pfn), word);
  }

  /** Stores a word; false when there is no memory for it. */
  store32(id: number, vpn: number, word: number, value: number): boolean {
    const pfn = this.#touch(id, vpn, true);
    if (pfn < 0) return false;
    this.#vcpu.store32(gfn(pfn), word, value);
    return true;
  }

  /** The page behind an access, after as many page faults as it takes; −1 without memory. */
  #touch(id: number, vpn: number, write: boolean): number {
    const root = this.#w[this.#slot(id) + X_ROOT];
    for (;;) {
      const pfn = this.mmu.translate(root, id, vpn, write);
      if (pfn >= 0) return pfn;
      if (!this.#fault(id, vpn, write)) return -1;
    }
  }

  /** The page mapped at `vpn`, without touching it; −1 if none is. */
  pageAt(id: number, vpn: number): number {
    const at = this.#entry(id, vpn);
    if (at < 0) return -1;
    const [low, high] = this.#read(at);
    return (low & PTE_P) === 0 ? -1 : ptePfn(low, high);
  }

  /** A page fault (`handle_mm_fault`); false without memory. */
  #fault(id: number, vpn: number, write: boolean): boolean {
    const w = this.#w;
    assert(vpn < w[this.#slot(id) + X_PAGES], 'an access inside the area');
    w[this.#events + EV.pgfault]++;
    const entry = this.#makeEntry(id, vpn);
    if (entry < 0) return false;
    const [seen] = this.#read(entry);
    // A page that is on its way: look again when it has arrived (`migration_entry_wait`).
    if ((seen & PTE_MIGRATION) !== 0) {
      this.#relax();
      return true;
    }
    const needsPage = (seen & PTE_P) === 0 || (write && (seen & PTE_W) === 0);
    const fresh = needsPage ? this.#newPage(vpn) : -1;
    if (needsPage && fresh < 0) return false;
    this.#lock(id);
    const [low, high] = this.#read(entry);
    let unused = fresh;
    let old = -1;
    if (low === 0 && fresh >= 0) {
      this.#write(entry, fresh, PTE_P | PTE_W | PTE_U);
      unused = -1;
    } else if (write && (low & (PTE_P | PTE_W)) === PTE_P) {
      const shared = ptePfn(low, high);
      if (Atomics.load(w, this.#memmap + (shared << 4) + P_REF) === 1)
        this.#setFlags(entry, low, low | PTE_W);
      else if (fresh >= 0) {
        // Nobody may store to the old page once it is copied, nor read it once the new one is there: a fork under way
        // has left writable translations (`ptep_clear_flush`).
        this.#clear(entry);
        this.shootdown.flushAll();
        this.#vcpu.copyPage(gfn(shared), gfn(fresh));
        this.#write(entry, fresh, PTE_P | PTE_W | PTE_U);
        unused = -1;
        old = shared;
        w[this.#events + EV.cow]++;
      }
    }
    this.#unlock(id);
    if (old >= 0) this.#drop(old);
    if (unused >= 0) this.#drop(unused);
    return true;
  }

  #newPage(vpn: number): number {
    const pfn = this.#alloc.alloc(0, MIGRATE_MOVABLE, USER_GFP);
    if (pfn < 0) return -1;
    const page = this.#memmap + (pfn << 4);
    this.#alloc.unstamp(pfn);
    // A process sees zeros: without `init_on_alloc` nobody has made them, with it the allocator's stamp is in their way.
    if (this.#zeroed) this.#vcpu.store32(gfn(pfn), 0, 0);
    else this.#vcpu.zeroPages(gfn(pfn), 1);
    this.#w[page + P_INDEX] = vpn;
    Atomics.or(this.#w, page + P_FLAGS, PG_ANON);
    return pfn;
  }

  // ── Page tables ──────────────────────────────────────────────────────────────────────────────────────────────────

  #newTable(): number {
    const pfn = this.#alloc.alloc(0, MIGRATE_UNMOVABLE, TABLE_GFP);
    if (pfn < 0) return -1;
    this.#alloc.unstamp(pfn);
    this.#vcpu.zeroPages(gfn(pfn), 1);
    return pfn;
  }

  /** Guest-physical address of the leaf entry of `vpn`; −1 if a table on the way is missing. */
  #entry(id: number, vpn: number): number {
    let table = this.#w[this.#slot(id) + X_ROOT];
    for (let level = PT_LEVELS; level > 1; level--) {
      const [low, high] = this.#read(table * 4096 + ptIndex(vpn, level) * 8);
      if ((low & PTE_P) === 0) return -1;
      table = ptePfn(low, high);
    }
    return table * 4096 + ptIndex(vpn, 1) * 8;
  }

  /** The same, but makes the tables that are missing; −1 without memory. */
  #makeEntry(id: number, vpn: number): number {
    let table = this.#w[this.#slot(id) + X_ROOT];
    for (let level = PT_LEVELS; level > 1; level--) {
      const at = table * 4096 + ptIndex(vpn, level) * 8;
      const [low, high] = this.#read(at);
      if ((low & PTE_P) !== 0) {
        table = ptePfn(low, high);
        continue;
      }
      // Memory first: an allocation may have to wait, and no spin lock is held then.
      const fresh = this.#newTable();
      if (fresh < 0) return -1;
      this.#lock(id);
      const [again, againHigh] = this.#read(at);
      if ((again & PTE_P) === 0) this.#write(at, fresh, PTE_P | PTE_W | PTE_U);
      this.#unlock(id);
      if ((again & PTE_P) === 0) table = fresh;
      else {
        this.#alloc.free(fresh, 0);
        table = ptePfn(again, againHigh);
      }
    }
    return table * 4096 + ptIndex(vpn, 1) * 8;
  }

  #freeTables(table: number, level: number): void {
    for (let index = 0; level > 1 && index < 512; index++) {
      const [low, high] = this.#read(table * 4096 + index * 8);
      if ((low & PTE_P) !== 0) this.#freeTables(ptePfn(low, high), level - 1);
    }
    this.#alloc.free(table, 0);
  }

  /** An entry as it is now: low and high word of one moment. */
  #read(at: number): [low: number, high: number] {
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
  #write(at: number, pfn: number, flags: number): void {
    const vcpu = this.#vcpu;
    vcpu.window(at, 8, true);
    const word = vcpu.at >> 2;
    Atomics.store(vcpu.i32, word, 0);
    Atomics.store(vcpu.i32, word + 1, pteHigh(pfn));
    Atomics.store(vcpu.i32, word, pteLow(pfn, flags));
  }

  /** Changes the flags of an entry; the hardware may have added A or D since it was read, which stay. */
  #setFlags(at: number, seen: number, wanted: number): void {
    const vcpu = this.#vcpu;
    for (let low = seen; ; ) {
      vcpu.window(at, 8, true);
      const word = vcpu.at >> 2;
      const found = Atomics.compareExchange(vcpu.i32, word, low, wanted | (low & (PTE_A | PTE_D)));
      if (found === low) return;
      low = found;
    }
  }

  /** Empties an entry by exchange; the page it mapped, or −1. */
  #clear(at: number): number {
    const vcpu = this.#vcpu;
    vcpu.window(at, 8, true);
    const word = vcpu.at >> 2;
    const high = Atomics.load(vcpu.i32, word + 1);
    const low = Atomics.exchange(vcpu.i32, word, 0);
    return (low & PTE_P) === 0 ? -1 : ptePfn(low, high);
  }

  // ── Migration ────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Moves an anonymous page to `to` under everybody who maps it. False: it is in other use, or gone; `to` is the caller's. */
  migrate(from: number, to: number): boolean {
    const w = this.#w;
    const page = this.#memmap + (from << 4);
    this.#lockRmap();
    const vpn = w[page + P_INDEX];
    const entries = this.#unmapForMigration(from, vpn);
    // Whoever stored through an old translation has done so now, or will not any more.
    if (entries.length > 0) this.shootdown.flushAll();
    const moves = entries.length > 0 && Atomics.load(w, page + P_REF) === entries.length;
    if (moves) {
      this.#vcpu.copyPage(gfn(from), gfn(to));
      const target = this.#memmap + (to << 4);
      this.#alloc.unstamp(to);
      w[target + P_INDEX] = vpn;
      Atomics.store(w, target + P_REF, entries.length);
      Atomics.or(w, target + P_FLAGS, PG_ANON);
    }
    for (const { id, at, flags } of entries) {
      this.#lock(id);
      this.#write(at, moves ? to : from, flags);
      this.#unlock(id);
    }
    if (moves) {
      Atomics.store(w, page + P_REF, 1);
      this.#drop(from);
    }
    this.#unlockRmap();
    return moves;
  }

  /** Turns every mapping of the page into a migration entry (`try_to_migrate`); where they were, and their flags. */
  #unmapForMigration(pfn: number, vpn: number): { id: number; at: number; flags: number }[] {
    const w = this.#w;
    const entries: { id: number; at: number; flags: number }[] = [];
    for (let id = 0; id < MAX_PROCESSES; id++) {
      const slot = this.#slot(id);
      if (w[slot + X_ALIVE] === 0 || vpn >= w[slot + X_PAGES]) continue;
      const at = this.#entry(id, vpn);
      if (at < 0) continue;
      this.#lock(id);
      const [seen, high] = this.#read(at);
      if ((seen & PTE_P) !== 0 && ptePfn(seen, high) === pfn) {
        const vcpu = this.#vcpu;
        vcpu.window(at, 8, true);
        // By exchange: a D bit that the hardware sets at the last moment is in what comes out.
        const low = Atomics.exchange(vcpu.i32, vcpu.at >> 2, pteLow(pfn, PTE_MIGRATION));
        entries.push({ id, at, flags: low & 0xfff });
      }
      this.#unlock(id);
    }
    return entries;
  }
}
