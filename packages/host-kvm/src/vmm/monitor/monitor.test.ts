/** Parts of the monitors by themselves; whole conversations are in the harness. */
import { expect, test } from 'vitest';
import { COST_TABLE, MiB, NS_PER_S, PAGE_SIZE } from '@ebb/machine';
import { MemoryDevice } from '../../devices/memory-device.ts';
import { MonitorEvents } from './events.ts';
import { JsonStream } from './json-stream.ts';
import { freeAddress } from './place-dimm.ts';
import type { Machine } from './machine.ts';
import { qomGet, qomSet } from './qom.ts';

test('a stream is cut into values wherever they end; brackets in strings do not count', () => {
  const stream = new JsonStream();
  expect(stream.feed('{"a": "}"')).toEqual([]);
  expect(stream.feed(', "b": {"c": "\\""}} x')).toEqual([
    { kind: 'value', text: '{"a": "}", "b": {"c": "\\""}}' },
  ]);
  expect(stream.feed('y\n')).toEqual([{ kind: 'garbage', text: 'xy' }]);
  expect(stream.feed(`{${'x'.repeat(1 << 20)}`)).toMatchObject([{ kind: 'garbage' }]);
  expect(stream.feed('{}')).toEqual([{ kind: 'value', text: '{}' }]);
});

test('events of one device are at most one a second: the first at once, then the newest', () => {
  const sent: number[] = [];
  const events = new MonitorEvents(
    (text) => sent.push((JSON.parse(text) as { data: { size: number } }).data.size),
    () => 0,
  );
  const changed = (size: number, seconds: number): void =>
    events.emit(
      { event: 'MEMORY_DEVICE_SIZE_CHANGE', data: { id: 'vm0', size, 'qom-path': '' } },
      seconds * NS_PER_S,
    );
  changed(1, 0);
  changed(2, 0.2);
  changed(3, 0.4);
  expect(events.nextDue()).toBe(NS_PER_S);
  events.flush(0.9 * NS_PER_S);
  expect(sent).toEqual([1]);
  events.flush(1 * NS_PER_S);
  expect(sent).toEqual([1, 3]);
  changed(4, 2.5);
  expect(sent).toEqual([1, 3, 4]);
});

/** A machine with one memory device of 64 MiB, of which 8 are asked for, and nothing else. */
function machine(): Machine {
  const device = new MemoryDevice({
    port: { spawn: () => undefined, now: () => 0, costs: COST_TABLE },
    region: {
      pageBytes: PAGE_SIZE,
      discard: function* () {
        yield undefined;
        return 0;
      },
      unmap: function* () {
        yield undefined;
      },
    },
    id: 'vm0',
    addr: 0,
    regionBytes: 64 * MiB,
    blockBytes: 2 * MiB,
    node: 0,
    requestedBytes: 8 * MiB,
  });
  return {
    name: 'one',
    nodes: [],
    backends: [],
    ramBlocks: [],
    memoryDevices: [{ device, memdev: 'mem0' }],
    balloon: null,
    slots: null,
    addBackend: () => undefined,
    removeBackend: () => undefined,
    flatView: [],
    running: true,
    settled: true,
    systemReset: () => undefined,
    quit: () => undefined,
  };
}

test.each([3 * MiB, 66 * MiB, -2 * MiB, 'much'])(
  'a requested size of %s is refused and changes nothing',
  (value) => {
    const one = machine();
    const path = '/machine/peripheral/vm0';
    expect(qomSet(one, path, 'requested-size', value).ok).toBe(false);
    expect(qomGet(one, path, 'requested-size')).toEqual({ ok: true, value: 8 * MiB });
    expect(qomSet(one, path, 'requested-size', 6 * MiB).ok).toBe(true);
    expect(qomGet(one, path, 'requested-size')).toEqual({ ok: true, value: 6 * MiB });
  },
);

test('a DIMM goes to the first gap that is wide enough, aligned', () => {
  const range = { addr: 1024 * MiB, bytes: 64 * MiB };
  const at = (mib: number, bytes: number): { addr: number; bytes: number } => ({
    addr: (1024 + mib) * MiB,
    bytes,
  });
  expect(freeAddress(range, [], 8 * MiB)).toBe(1024 * MiB);
  const taken = [at(16, 7 * MiB), at(0, 8 * MiB)];
  expect(freeAddress(range, taken, 8 * MiB)).toBe(1032 * MiB);
  // What ends at 23 MiB leaves room from 24 on.
  expect(freeAddress(range, taken, 10 * MiB)).toBe(1048 * MiB);
  expect(freeAddress(range, taken, 41 * MiB)).toBe(null);
});
