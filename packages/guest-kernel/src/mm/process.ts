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
import * as machine from '@ebb/machine';
import { assert, gfn, GuestMmu, ptePfn, spinLock, spinUnlock, type Vcpu } from '@ebb/machine';
import type { Arena } from '../arena.ts';
import * as layout from '../layout.ts';
import { EV, eventRow } from './events.ts';
import * as pageWords from './page.ts';
import type { PageAllocator } from './page-alloc.ts';
import { PageTables } from './page-tables.ts';
import { TlbShootdown } from './shootdown.ts';
import * as zoneWords from './zone.ts';

// Local copies: docs/performance.md § Constants.
const { PTE_D, PTE_MIGRATION, PTE_P, PTE_U, PTE_W } = machine;
const { H_RMAP_LOCK, MAX_PROCESSES, PROCESS_BASE, PROCESS_WORDS } = layout;
const { P_FLAGS, P_INDEX, P_REF, PG_ANON } = pageWords;
const { MIGRATE_MOVABLE } = zoneWords;

/** Words of a process. */
const X_ALIVE = 0;
const X_ROOT = 1;
/** Pages of its one area. */
const X_PAGES = 2;
const X_LOCK = 16;

/** Highest zone: Movable for what processes hold; their page tables are in Normal (H24). */
const USER_GFP = 3;

export class Processes {
  readonly mmu: GuestMmu;
  readonly shootdown: TlbShootdown;
  readonly #w: Int32Array;
  readonly #memmap: number;
  readonly #vcpu: Vcpu;
  readonly #alloc: PageAllocator;
  readonly #tables: PageTables;
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
    this.#tables = new PageTables(vcpu, alloc, arena.w, this.#relax);
    this.shootdown = new TlbShootdown(arena, vcpu, this.mmu, nrCpus, this.#relax);
  }

  #slot(id: number): number {
    return PROCESS_BASE + id * PROCESS_WORDS;
  }
  #lock(id: number): void {
    this.#tables.lock(this.#slot(id) + X_LOCK);
  }
  #unlock(id: number): void {
    this.#tables.unlock(this.#slot(id) + X_LOCK);
  }
  #lockRmap(): void {
    spinLock(this.#w, H_RMAP_LOCK, this.#vcpu.id, this.#relax);
  }
  #unlockRmap(): void {
    spinUnlock(this.#w, H_RMAP_LOCK);
  }

  /** Guest-physical address of the leaf entry of `vpn`; −1 if a table on the way is missing. */
  #entryOf(id: number, vpn: number): number {
    return this.#tables.entry(this.#w[this.#slot(id) + X_ROOT], vpn);
  }
  /** The same, but makes the tables that are missing; −1 without memory. */
  #makeEntry(id: number, vpn: number): number {
    const slot = this.#slot(id);
    return this.#tables.makeEntry(this.#w[slot + X_ROOT], vpn, slot + X_LOCK);
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
      const root = this.#tables.newTable();
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
      const from = this.#entryOf(parent, vpn);
      if (from < 0) continue;
      const into = this.#makeEntry(child, vpn);
      if (into < 0) {
        this.shootdown.flushAll();
        this.#tearDown(child);
        this.#unlockRmap();
        return -1;
      }
      this.#lock(parent);
      const [low, high] = this.#tables.read(from);
      if ((low & PTE_P) !== 0) {
        this.#tables.setFlags(from, low, low & ~PTE_W);
        Atomics.add(w, this.#memmap + (ptePfn(low, high) << 4) + P_REF, 1);
        this.#tables.write(into, ptePfn(low, high), (low & 0xfff & ~(PTE_W | PTE_D)) | PTE_P);
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
      const entry = this.#entryOf(id, vpn);
      if (entry < 0) continue;
      this.#lock(id);
      const pfn = this.#tables.clear(entry);
      this.#unlock(id);
      if (pfn >= 0) freed.push(pfn);
    }
    this.shootdown.flushAll();
    for (const pfn of freed) this.#drop(pfn);
    this.#tables.freeAll(w[slot + X_ROOT]);
    w[slot + X_ALIVE] = 0;
  }

  /** Gives the page at `vpn` up (`MADV_DONTNEED`): the next access finds zeros. */
  discard(id: number, vpn: number): void {
    const entry = this.#entryOf(id, vpn);
    if (entry < 0) return;
    for (;;) {
      this.#lock(id);
      const [low] = this.#tables.read(entry);
      if ((low & PTE_MIGRATION) !== 0) {
        this.#unlock(id);
        this.#relax();
        continue;
      }
      const pfn = this.#tables.clear(entry);
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

  /** Loads a word of a process's memory, after as many page faults as it takes; undefined when there is no memory for it. */
  load32(id: number, vpn: number, word: number): number | undefined {
    const root = this.#w[this.#slot(id) + X_ROOT];
    while (!this.mmu.load32(root, id, vpn, word)) if (!this.#fault(id, vpn, false)) return undefined;
    return this.mmu.value;
  }

  /** Stores a word; false when there is no memory for it. */
  store32(id: number, vpn: number, word: number, value: number): boolean {
    const root = this.#w[this.#slot(id) + X_ROOT];
    while (!this.mmu.store32(root, id, vpn, word, value)) if (!this.#fault(id, vpn, true)) return false;
    return true;
  }

  /** The page mapped at `vpn`, without touching it; −1 if none is. */
  pageAt(id: number, vpn: number): number {
    const at = this.#entryOf(id, vpn);
    if (at < 0) return -1;
    const [low, high] = this.#tables.read(at);
    return (low & PTE_P) === 0 ? -1 : ptePfn(low, high);
  }

  /** A page fault (`handle_mm_fault`); false without memory. */
  #fault(id: number, vpn: number, write: boolean): boolean {
    const w = this.#w;
    assert(vpn < w[this.#slot(id) + X_PAGES], 'an access inside the area');
    w[this.#events + EV.pgfault]++;
    const entry = this.#makeEntry(id, vpn);
    if (entry < 0) return false;
    const [seen] = this.#tables.read(entry);
    // A page that is on its way: look again when it has arrived (`migration_entry_wait`).
    if ((seen & PTE_MIGRATION) !== 0) {
      this.#relax();
      return true;
    }
    const needsPage = (seen & PTE_P) === 0 || (write && (seen & PTE_W) === 0);
    const fresh = needsPage ? this.#newPage(vpn) : -1;
    if (needsPage && fresh < 0) return false;
    this.#lock(id);
    const [low, high] = this.#tables.read(entry);
    let unused = fresh;
    let old = -1;
    if (low === 0 && fresh >= 0) {
      this.#tables.write(entry, fresh, PTE_P | PTE_W | PTE_U);
      unused = -1;
    } else if (write && (low & (PTE_P | PTE_W)) === PTE_P) {
      const shared = ptePfn(low, high);
      if (Atomics.load(w, this.#memmap + (shared << 4) + P_REF) === 1)
        this.#tables.setFlags(entry, low, low | PTE_W);
      else if (fresh >= 0) {
        // Nobody may store to the old page once it is copied, nor read it once the new one is there: a fork under way
        // has left writable translations (`ptep_clear_flush`).
        this.#tables.clear(entry);
        this.shootdown.flushAll();
        this.#vcpu.copyPage(gfn(shared), gfn(fresh));
        this.#tables.write(entry, fresh, PTE_P | PTE_W | PTE_U);
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
      this.#tables.write(at, moves ? to : from, flags);
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
      const at = this.#entryOf(id, vpn);
      if (at < 0) continue;
      this.#lock(id);
      const [seen, high] = this.#tables.read(at);
      if ((seen & PTE_P) !== 0 && ptePfn(seen, high) === pfn) {
        entries.push({ id, at, flags: this.#tables.replace(at, pfn, PTE_MIGRATION) });
      }
      this.#unlock(id);
    }
    return entries;
  }
}
