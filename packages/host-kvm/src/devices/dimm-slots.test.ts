/** DIMM slots as firmware and guest see them, register by register, and what a guest can do to them. */
import { expect, test } from 'vitest';
import {
  ACPI_MEM_ADDR_HIGH,
  ACPI_MEM_ADDR_LOW,
  ACPI_MEM_BYTES,
  ACPI_MEM_EJECT,
  ACPI_MEM_ENABLED,
  ACPI_MEM_FLAGS,
  ACPI_MEM_INSERTING,
  ACPI_MEM_NODE,
  ACPI_MEM_OST_STATUS,
  ACPI_MEM_REMOVING,
  ACPI_MEM_SELECTOR,
  ACPI_MEM_SIZE_HIGH,
  ACPI_MEM_SIZE_LOW,
  ACPI_OST_BUSY,
  GiB,
  inlineSchedule,
  MiB,
} from '@ebb/machine';
import { HostTasks } from '../host-tasks.ts';
import { DimmSlots, type Dimm } from './dimm-slots.ts';

function world(slots = 2): { dimms: DimmSlots; log: string[]; run: () => void; attachable: { ok: boolean } } {
  const tasks = new HostTasks(inlineSchedule);
  const log: string[] = [];
  const attachable = { ok: true };
  const dimms = new DimmSlots(0x1000, slots, {
    spawn: (name, body) => void tasks.spawn(name, body),
    interrupt: () => log.push('event'),
    *attach(dimm) {
      yield undefined;
      log.push(`attach ${dimm.id}`);
      return attachable.ok;
    },
    *detach(dimm) {
      yield undefined;
      log.push(`detach ${dimm.id}`);
    },
  });
  return {
    dimms,
    log,
    attachable,
    run: () => {
      while (tasks.step());
    },
  };
}
const A: Dimm = { id: 'a', addr: 5 * GiB, bytes: 6 * GiB, node: 1 };
const B: Dimm = { id: 'b', addr: 1 * GiB, bytes: 128 * MiB, node: 0 };

test('a DIMM is there before the guest is told of it, and reads as it is', () => {
  const { dimms, log, run } = world();
  expect(dimms.plug(A)).toBe('');
  expect(dimms.read(ACPI_MEM_FLAGS, 4)).toBe(0);
  run();
  expect(log).toEqual(['attach a', 'event']);
  expect(dimms.read(ACPI_MEM_FLAGS, 1)).toBe(ACPI_MEM_ENABLED | ACPI_MEM_INSERTING);
  const registers = [
    ACPI_MEM_ADDR_LOW,
    ACPI_MEM_ADDR_HIGH,
    ACPI_MEM_SIZE_LOW,
    ACPI_MEM_SIZE_HIGH,
    ACPI_MEM_NODE,
  ];
  expect(registers.map((r) => dimms.read(r, 4))).toEqual([0x4000_0000, 1, 0x8000_0000, 1, 1]);
  dimms.write(ACPI_MEM_FLAGS, 1, ACPI_MEM_INSERTING);
  expect(dimms.read(ACPI_MEM_FLAGS, 1)).toBe(ACPI_MEM_ENABLED);
});

test('what cannot be plugged is named and changes nothing', () => {
  const { dimms, run } = world(1);
  expect(dimms.plug({ ...B, bytes: 3 * MiB })).toMatch(/multiple of 0x200000/);
  expect(dimms.plug({ ...B, addr: MiB })).toMatch(/aligned to 0x200000/);
  expect(dimms.plug(A)).toBe('');
  run();
  expect(dimms.plug(A)).toBe("Duplicate device ID 'a'");
  expect(dimms.plug({ ...B, addr: 6 * GiB })).toBe("address range conflicts with memory device id='a'");
  expect(dimms.plug(B)).toBe('no free slots available');
  expect(dimms.requestUnplug('b')).toBe("Device 'b' not found");
  expect(dimms.counters).toEqual({ plugged: 1, ejected: 0, failures: 0, refused: 5 });
  // The VM's memory map may refuse as well: then the slot is free again.
  const other = world(1);
  other.attachable.ok = false;
  expect(other.dimms.plug(A)).toBe('');
  other.run();
  expect([other.dimms.dimms, other.log]).toEqual([[], ['attach a']]);
  other.attachable.ok = true;
  expect(other.dimms.plug(A)).toBe('');
  other.run();
  expect(other.dimms.dimms).toEqual([A]);
});

test('a request to go is an event; the memory goes with the eject, and its slot takes another', () => {
  const { dimms, log, run } = world(1);
  dimms.plug(B);
  run();
  expect(dimms.requestUnplug('b')).toBe('');
  expect(dimms.read(ACPI_MEM_FLAGS, 4)).toBe(ACPI_MEM_ENABLED | ACPI_MEM_INSERTING | ACPI_MEM_REMOVING);
  dimms.write(ACPI_MEM_FLAGS, 4, ACPI_MEM_INSERTING | ACPI_MEM_REMOVING);
  dimms.write(ACPI_MEM_OST_STATUS, 4, ACPI_OST_BUSY);
  expect([dimms.ostStatus('b'), dimms.counters.failures, dimms.dimms.length]).toEqual([ACPI_OST_BUSY, 1, 1]);
  dimms.write(ACPI_MEM_FLAGS, 4, ACPI_MEM_EJECT);
  // Twice is once.
  dimms.write(ACPI_MEM_FLAGS, 4, ACPI_MEM_EJECT);
  expect(dimms.plug(A)).toBe('no free slots available');
  run();
  expect(log.filter((l) => l !== 'event')).toEqual(['attach b', 'detach b']);
  expect([dimms.read(ACPI_MEM_FLAGS, 4), dimms.plug(A)]).toEqual([0, '']);
});

test('any access at any offset and width is survived; an empty slot has nothing to eject', () => {
  const { dimms, log, run } = world();
  for (let offset = 0; offset < ACPI_MEM_BYTES; offset++)
    for (const width of [1, 2, 4, 8])
      for (const value of [0, 1, 0xff, 0xffff_ffff]) {
        dimms.write(offset, width, value);
        expect(dimms.read(offset, width)).toBeGreaterThanOrEqual(0);
      }
  // Beyond the last slot the selector stays where it is.
  dimms.write(ACPI_MEM_SELECTOR, 4, 1);
  dimms.write(ACPI_MEM_SELECTOR, 4, 9);
  run();
  expect(log).toEqual([]);
  dimms.plug(A);
  dimms.plug(B);
  run();
  expect(dimms.read(ACPI_MEM_SIZE_LOW, 4)).toBe(128 * MiB);
});
