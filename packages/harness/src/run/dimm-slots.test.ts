/** Which memory slots DIMMs get while slots are slow to change. */
import { HostTasks } from '@ebb/host-kvm';
import { GiB, inlineSchedule, MiB, ok } from '@ebb/machine';
import type { MemFile } from '@ebb/memfs';
import { expect, test } from 'vitest';
import { dimmSlots } from './power-on.ts';

test('two DIMMs plugged at once have a slot each, though the first is still waiting for its own', () => {
  const tasks = new HostTasks(inlineSchedule);
  const asked: number[] = [];
  let busy = true;
  const vm = {
    id: 0,
    vcpus: { interrupt: () => undefined },
    // A discard is under way: whoever wants a slot waits.
    *setUserMemoryRegion({ slot }: { slot: number }) {
      asked.push(slot);
      while (busy) yield () => !busy;
      return ok(undefined);
    },
    *discard() {
      yield undefined;
      return 0;
    },
  } as never;
  const files: MemFile[] = [];
  const dimms = dimmSlots(4, vm, { tasks }, () => ({}) as MemFile, files);
  for (const id of ['a', 'b'])
    expect(dimms.plug({ id, addr: (id === 'a' ? 4 : 5) * GiB, bytes: 128 * MiB, node: 0 })).toBe('');
  while (tasks.step());
  busy = false;
  while (tasks.step());
  expect([new Set(asked).size, files.length]).toEqual([2, 2]);
});
