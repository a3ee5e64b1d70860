/**
 * Registers by which firmware and a guest's ACPI code learn of memory devices in slots, as QEMU has them ("QEMU<->ACPI
 * BIOS memory hotplug interface"): 24 bytes, one slot at a time behind a selector.
 */

export const ACPI_MEM_BYTES = 0x18;

/** Read: address and size of the selected slot's memory in bytes, as halves; its node. */
export const ACPI_MEM_ADDR_LOW = 0x0;
export const ACPI_MEM_ADDR_HIGH = 0x4;
export const ACPI_MEM_SIZE_LOW = 0x8;
export const ACPI_MEM_SIZE_HIGH = 0xc;
export const ACPI_MEM_NODE = 0x10;
/** Read: status bits. Write: control bits. */
export const ACPI_MEM_FLAGS = 0x14;

/** Write: which slot the other registers are about; what the guest says of an event (`_OST`). */
export const ACPI_MEM_SELECTOR = 0x0;
export const ACPI_MEM_OST_EVENT = 0x4;
export const ACPI_MEM_OST_STATUS = 0x8;

/** Status: there is memory in the slot; it came; it is asked to go. Writing an event's bit clears the event. */
export const ACPI_MEM_ENABLED = 1;
export const ACPI_MEM_INSERTING = 2;
export const ACPI_MEM_REMOVING = 4;
/** Control: the guest has let go of the memory (`_EJ0`). */
export const ACPI_MEM_EJECT = 8;

/** `_OST` events and statuses (ACPI 6 § 6.3.5). */
export const ACPI_OST_INSERT = 0x200;
export const ACPI_OST_EJECT = 0x103;
export const ACPI_OST_SUCCESS = 0;
export const ACPI_OST_FAILURE = 1;
/** Of an ejection: the device is busy. */
export const ACPI_OST_BUSY = 0x82;
