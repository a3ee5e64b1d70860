/** Parts of the monitors by themselves; whole conversations are in the harness. */
import { expect, test } from 'vitest';
import { NS_PER_S } from '@ebb/machine';
import { MonitorEvents } from './events.ts';
import { JsonStream } from './json-stream.ts';

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
