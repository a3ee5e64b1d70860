/**
 * Hotplug of DIMMs, as Linux does it with ACPI (`drivers/acpi/acpi_memhotplug.c`, `acpi_device_hotplug`): a DIMM's memory
 * blocks are added and put online; asked to let it go, all of them go offline, or those that did come back and the request
 * has failed. There is no second try: who asked has to ask again.
 *
 * On vCPU 0. Simplified: the interpreter of the firmware's methods is not modelled, its registers are read as the methods do.
 */
import {
  ACPI_MEM_ADDR_HIGH,
  ACPI_MEM_ADDR_LOW,
  ACPI_MEM_EJECT,
  ACPI_MEM_ENABLED,
  ACPI_MEM_FLAGS,
  ACPI_MEM_INSERTING,
  ACPI_MEM_NODE,
  ACPI_MEM_OST_EVENT,
  ACPI_MEM_OST_STATUS,
  ACPI_MEM_REMOVING,
  ACPI_MEM_SELECTOR,
  ACPI_MEM_SIZE_HIGH,
  ACPI_MEM_SIZE_LOW,
  ACPI_OST_BUSY,
  ACPI_OST_EJECT,
  ACPI_OST_FAILURE,
  ACPI_OST_INSERT,
  ACPI_OST_SUCCESS,
  PAGE_SIZE,
  type Vcpu,
} from '@ebb/machine';
import type { Arena } from '../arena.ts';
import { DIMM_GROUPS, T_ACPI } from '../layout.ts';
import type { MemoryHotplug } from '../mm/memory-hotplug.ts';
import { LINE_ACPI, MMIO_BASE, MMIO_STRIDE } from './virtio-guest.ts';

/** What has not been looked at. vCPU 0's alone. */
const A_WORK = 0;
const EVENT = 1;
/** The first look: DIMMs that were there before the kernel. */
const BOOT = 2;

export class AcpiMemory {
  readonly #w: Int32Array;
  readonly #vcpu: Vcpu;
  readonly #hotplug: MemoryHotplug;
  readonly #slots: number;
  readonly #maxPfn: number;

  constructor(arena: Arena, vcpu: Vcpu, hotplug: MemoryHotplug, slots: number) {
    this.#w = arena.w;
    this.#vcpu = vcpu;
    this.#hotplug = hotplug;
    this.#slots = slots;
    this.#maxPfn = arena.maxPfn;
  }

  /** The general-purpose event: something about a slot has changed. */
  interrupt(): void {
    this.#w[T_ACPI + A_WORK] |= EVENT;
  }
  /** The kernel is up: looks for DIMMs that are in already (`acpi_bus_scan`). */
  probe(): void {
    if (this.#slots > 0) this.#w[T_ACPI + A_WORK] = BOOT;
  }

  get pending(): boolean {
    return this.#w[T_ACPI + A_WORK] !== 0;
  }

  /** Looks at every slot (`\_SB.MHPC.MSCN`), memory that comes before memory that goes. */
  work(): void {
    const isFirst = (this.#w[T_ACPI + A_WORK] & BOOT) !== 0;
    this.#w[T_ACPI + A_WORK] = 0;
    for (let slot = 0; slot < this.#slots; slot++) {
      this.#write(ACPI_MEM_SELECTOR, slot);
      const flags = this.#read(ACPI_MEM_FLAGS);
      if ((flags & ACPI_MEM_ENABLED) === 0) continue;
      if ((flags & ACPI_MEM_INSERTING) !== 0) {
        this.#write(ACPI_MEM_FLAGS, ACPI_MEM_INSERTING);
        this.#report(ACPI_OST_INSERT, this.#add(slot) ? ACPI_OST_SUCCESS : ACPI_OST_FAILURE);
      } else if (isFirst) this.#add(slot);
      else if ((flags & ACPI_MEM_REMOVING) !== 0) {
        this.#write(ACPI_MEM_FLAGS, ACPI_MEM_REMOVING);
        if (this.#remove(slot)) this.#write(ACPI_MEM_FLAGS, ACPI_MEM_EJECT);
        else this.#report(ACPI_OST_EJECT, ACPI_OST_BUSY);
      }
    }
  }

  /** Pages of the selected slot, and the first of them. */
  #extent(): { first: number; pages: number } {
    const both = (low: number, high: number): number =>
      (this.#read(high) * 0x1_0000_0000 + this.#read(low)) / PAGE_SIZE;
    return {
      first: both(ACPI_MEM_ADDR_LOW, ACPI_MEM_ADDR_HIGH),
      pages: both(ACPI_MEM_SIZE_LOW, ACPI_MEM_SIZE_HIGH),
    };
  }

  /** Adds the selected slot's memory, block by block; all of it or none. */
  #add(slot: number): boolean {
    const { first, pages } = this.#extent();
    const { sectionPages } = this.#hotplug;
    // `check_hotplug_memory_range`: whole memory blocks, or nothing.
    if (first % sectionPages !== 0 || pages % sectionPages !== 0 || first + pages > this.#maxPfn)
      return false;
    // In use since boot, by the firmware's map (`-EEXIST`).
    if (this.#hotplug.isAdded(first)) return true;
    const group = DIMM_GROUPS + slot;
    this.#hotplug.registerGroup(group, this.#read(ACPI_MEM_NODE), pages);
    for (let pfn = first; pfn < first + pages; pfn += sectionPages) {
      if (this.#hotplug.add(pfn, group)) continue;
      for (let p = first; p < pfn; p += sectionPages) this.#hotplug.remove(p, group);
      return false;
    }
    for (let pfn = first; this.#hotplug.autoOnline && pfn < first + pages; pfn += sectionPages)
      this.#hotplug.online(pfn, group, () => true);
    return true;
  }

  /** Takes the selected slot's memory out of use and removes it. False: some of it would not go, and all stays. */
  #remove(slot: number): boolean {
    const { first, pages } = this.#extent();
    const { sectionPages } = this.#hotplug;
    // Added in vain, there is nothing to take out of use.
    if (pages === 0 || !this.#hotplug.isAdded(first)) return true;
    for (let pfn = first; this.#hotplug.isOnline(first) && pfn < first + pages; pfn += sectionPages) {
      if (this.#hotplug.fakeOffline(pfn, sectionPages, false)) continue;
      for (let p = first; p < pfn; p += sectionPages) this.#hotplug.fakeOnline(p, sectionPages);
      return false;
    }
    for (let pfn = first; pfn < first + pages; pfn += sectionPages)
      this.#hotplug.remove(pfn, DIMM_GROUPS + slot);
    return true;
  }

  #report(event: number, status: number): void {
    this.#write(ACPI_MEM_OST_EVENT, event);
    this.#write(ACPI_MEM_OST_STATUS, status);
  }

  #read(offset: number): number {
    return this.#vcpu.mmioRead(MMIO_BASE + LINE_ACPI * MMIO_STRIDE + offset, 4) >>> 0;
  }
  #write(offset: number, value: number): void {
    this.#vcpu.mmioWrite(MMIO_BASE + LINE_ACPI * MMIO_STRIDE + offset, 4, value);
  }
}
