/**
 * Memory devices in slots (`pc-dimm`), announced through QEMU's ACPI registers: a DIMM comes whole, and goes whole if the
 * guest lets go of all of it. What is plain hotplug, beside which virtio-mem is to be seen (H22, H58).
 */
import {
  ACPI_MEM_ADDR_HIGH,
  ACPI_MEM_ADDR_LOW,
  ACPI_MEM_BYTES,
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
  ACPI_OST_SUCCESS,
  assert,
  MiB,
} from '@ebb/machine';
import type { TaskBody, TaskYield } from '../host-tasks.ts';
import type { MmioRegion } from '../kvm/vm.ts';

/** A DIMM: bytes at a guest-physical address, on a node. */
export interface Dimm {
  readonly id: string;
  readonly addr: number;
  readonly bytes: number;
  readonly node: number;
}

/** A slot with a DIMM: what the guest last said of it by `_OST`. */
export interface DimmSlotStatus {
  readonly slot: number;
  readonly dimm: Dimm | null;
  readonly ostEvent: number;
  readonly ostStatus: number;
}

/** For whoever watches: the guest has said how an insertion or a removal went, or a DIMM is gone. */
export type DimmNews = { readonly kind: 'ost' | 'deleted' } & DimmSlotStatus;

/** What becomes of a DIMM's memory is the VM's. */
export interface DimmPort {
  spawn(name: string, body: TaskBody): void;
  /** Gives the VM the memory, in a slot of its own; false: what is there is in its way. */
  attach(dimm: Dimm): Generator<TaskYield, boolean, void>;
  /** Takes it away, with its content; returns when nothing reaches it any more. */
  detach(dimm: Dimm): Generator<TaskYield, void, void>;
  /** The general-purpose event that tells the guest to look (GPE.3). */
  interrupt(): void;
  news?(news: DimmNews): void;
}

interface Slot {
  dimm: Dimm | null;
  enabled: boolean;
  inserting: boolean;
  removing: boolean;
  ejecting: boolean;
  ostEvent: number;
  ostStatus: number;
}

const empty = (): Slot => ({
  dimm: null,
  enabled: false,
  inserting: false,
  removing: false,
  ejecting: false,
  ostEvent: 0,
  ostStatus: ACPI_OST_SUCCESS,
});

export interface DimmCounters {
  plugged: number;
  ejected: number;
  /** What the guest said did not work, by `_OST`. */
  failures: number;
  /** What could not be plugged at all. */
  refused: number;
}

/** QEMU's alignment of memory devices on x86. */
export const DIMM_ALIGN: number = 2 * MiB;

/** Why a DIMM cannot come beside others, in QEMU's words, or nothing. `hasSlot`: one of the slots is free. */
export function judgeDimm(
  { id, addr, bytes }: Dimm,
  others: readonly Pick<Dimm, 'id' | 'addr' | 'bytes'>[],
  hasSlot: boolean,
): string {
  if (others.some((d) => d.id === id)) return `Duplicate device ID '${id}'`;
  if (bytes <= 0 || bytes % DIMM_ALIGN !== 0)
    return `backend memory size must be multiple of 0x${DIMM_ALIGN.toString(16)}`;
  if (addr % DIMM_ALIGN !== 0) return `address must be aligned to 0x${DIMM_ALIGN.toString(16)} bytes`;
  const hit = others.find((d) => addr < d.addr + d.bytes && d.addr < addr + bytes);
  if (hit !== undefined) return `address range conflicts with memory device id='${hit.id}'`;
  return hasSlot ? '' : 'no free slots available';
}

export class DimmSlots implements MmioRegion {
  /** Guest-physical address of the registers. */
  readonly base: number;
  readonly bytes: number = ACPI_MEM_BYTES;
  readonly counters: DimmCounters = { plugged: 0, ejected: 0, failures: 0, refused: 0 };
  readonly #port: DimmPort;
  readonly #slots: Slot[];
  #selected = 0;

  constructor(base: number, slots: number, port: DimmPort) {
    this.base = base;
    this.#port = port;
    assert(slots > 0, 'a machine with DIMMs has slots for them');
    this.#slots = Array.from({ length: slots }, empty);
  }

  /** DIMMs that are in. */
  get dimms(): readonly Dimm[] {
    return this.#slots.flatMap((s) => (s.dimm === null ? [] : [s.dimm]));
  }

  /** Every slot, with or without a DIMM. */
  get status(): readonly DimmSlotStatus[] {
    return this.#slots.map((s, slot) => ({
      slot,
      dimm: s.dimm,
      ostEvent: s.ostEvent,
      ostStatus: s.ostStatus,
    }));
  }

  /** Last `_OST` status of a DIMM; 0 is success. */
  ostStatus(id: string): number | undefined {
    return this.#slots.find((s) => s.dimm?.id === id)?.ostStatus;
  }

  // ── Host ─────────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Plugs a DIMM; why not, in QEMU's words, or nothing. Returns before the guest has heard of it. */
  plug(dimm: Dimm): string {
    const why = this.#judge(dimm);
    if (why !== '') {
      this.counters.refused++;
      return why;
    }
    const slot = this.#slots.find((s) => s.dimm === null) as Slot;
    slot.dimm = dimm;
    this.#port.spawn(`dimm/${dimm.id}`, this.#insert(slot, dimm));
    return '';
  }

  /** A DIMM that is in when the machine is switched on. The guest finds it as it boots. */
  *coldPlug(dimm: Dimm): Generator<TaskYield, void, void> {
    assert(this.#judge(dimm) === '', 'a DIMM of the start has a slot and a place');
    const slot = this.#slots.find((s) => s.dimm === null) as Slot;
    const attached = yield* this.#port.attach(dimm);
    assert(attached, 'nothing is in the way of a DIMM of the start');
    slot.dimm = dimm;
    slot.enabled = true;
    this.counters.plugged++;
  }

  #judge(dimm: Dimm): string {
    return judgeDimm(dimm, this.dimms, this.dimms.length < this.#slots.length);
  }

  *#insert(slot: Slot, dimm: Dimm): TaskBody {
    if (!(yield* this.#port.attach(dimm))) {
      slot.dimm = null;
      this.counters.refused++;
      return;
    }
    slot.enabled = true;
    slot.inserting = true;
    this.counters.plugged++;
    this.#port.interrupt();
  }

  /** Asks the guest to let go of a DIMM; it may not. Why it cannot be asked, or nothing. */
  requestUnplug(id: string): string {
    const slot = this.#slots.find((s) => s.dimm?.id === id && s.enabled);
    if (slot === undefined) return `Device '${id}' not found`;
    slot.removing = true;
    this.#port.interrupt();
    return '';
  }

  // ── Registers ────────────────────────────────────────────────────────────────────────────────────────────────────

  read(offset: number, width: number): number {
    const slot = this.#slots.at(this.#selected);
    // A slot that is not there reads as nothing, as in QEMU.
    if (slot === undefined || (width !== 4 && offset !== ACPI_MEM_FLAGS)) return 0;
    const { dimm } = slot;
    switch (offset) {
      case ACPI_MEM_ADDR_LOW:
        return (dimm?.addr ?? 0) >>> 0;
      case ACPI_MEM_ADDR_HIGH:
        return Math.floor((dimm?.addr ?? 0) / 0x1_0000_0000);
      case ACPI_MEM_SIZE_LOW:
        return (dimm?.bytes ?? 0) >>> 0;
      case ACPI_MEM_SIZE_HIGH:
        return Math.floor((dimm?.bytes ?? 0) / 0x1_0000_0000);
      case ACPI_MEM_NODE:
        return dimm?.node ?? 0;
      case ACPI_MEM_FLAGS:
        return (
          (slot.enabled ? ACPI_MEM_ENABLED : 0) |
          (slot.inserting ? ACPI_MEM_INSERTING : 0) |
          (slot.removing ? ACPI_MEM_REMOVING : 0)
        );
      default:
        return 0xffff_ffff;
    }
  }

  write(offset: number, width: number, value: number): void {
    if (offset === ACPI_MEM_SELECTOR) {
      // Beyond the last slot it has no effect on what is selected.
      if (width === 4 && value >>> 0 < this.#slots.length) this.#selected = value >>> 0;
      return;
    }
    const slot = this.#slots[this.#selected];
    switch (offset) {
      case ACPI_MEM_OST_EVENT:
        slot.ostEvent = value >>> 0;
        break;
      case ACPI_MEM_OST_STATUS:
        slot.ostStatus = value >>> 0;
        if (slot.ostStatus !== ACPI_OST_SUCCESS) this.counters.failures++;
        this.#tell('ost', this.#selected);
        break;
      case ACPI_MEM_FLAGS:
        if ((value & ACPI_MEM_INSERTING) !== 0) slot.inserting = false;
        if ((value & ACPI_MEM_REMOVING) !== 0) slot.removing = false;
        if ((value & ACPI_MEM_EJECT) !== 0) this.#eject(slot);
        break;
    }
  }

  /** The guest lets go: the memory goes, and with it what was in it. A guest that lies loses it all the same. */
  #eject(slot: Slot): void {
    const { dimm } = slot;
    if (dimm === null || !slot.enabled || slot.ejecting) return;
    slot.ejecting = true;
    this.#port.spawn(`dimm/${dimm.id}`, this.#remove(slot, dimm));
  }

  *#remove(slot: Slot, dimm: Dimm): TaskBody {
    yield* this.#port.detach(dimm);
    this.#tell('deleted', this.#slots.indexOf(slot));
    Object.assign(slot, empty());
    this.counters.ejected++;
  }

  #tell(kind: DimmNews['kind'], at: number): void {
    this.#port.news?.({ kind, ...this.status[at] });
  }
}
