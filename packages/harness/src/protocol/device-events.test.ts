/** Recorded device traces as they are read: QEMU’s log, JSON lines, and what is neither. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, expect, test } from 'vitest';
import { checkTrace } from './check-trace.ts';
import { readDeviceTrace } from './device-events.ts';

const folder = mkdtempSync(join(tmpdir(), 'ebb-check-'));
afterAll(() => rmSync(folder, { recursive: true }));

function fileOf(name: string, text: string): string {
  const path = join(folder, name);
  writeFileSync(path, text);
  return path;
}

test("QEMU's log, with the fields that 7.2 prints without a space", () => {
  const trace = readDeviceTrace(
    fileOf(
      'a.log',
      '1@2.3:virtio_mem_resized_usable_region old_size=0x0new_size=0x50000000\n1@2.4:virtio_mem_plug_request addr=0x140000000 nb_blocks=64\n1@2.5:virtio_mem_send_response type=0\nother line\n1@2.6:virtio_balloon_set_config actual: 256 oldactual: 0\n',
    ),
  );
  expect(trace.events.map((e) => e.event)).toEqual([
    { event: 'usable', before: 0, after: 0x50000000 },
    { event: 'plug', addr: 0x140000000, nb_blocks: 64 },
    { event: 'response', type: 0 },
    { event: 'actual', pages: 256, before: 0 },
  ]);
  expect([trace.skipped, checkTrace(trace).breaches]).toEqual([1, []]);
});
test('what is malformed is one line with its number and text', () => {
  expect(() => readDeviceTrace(fileOf('b.jsonl', '{"event":"kick","queue":0}\n{"event":"kick"}\n'))).toThrow(
    /b\.jsonl:2: queue: .*"kick"/,
  );
  expect(() => readDeviceTrace(fileOf('c.jsonl', '{"event":"kick","queue":0}\nnonsense\n'))).toThrow(
    /c\.jsonl:2: not JSON: nonsense/,
  );
  expect(() => readDeviceTrace(fileOf('d.log', 'hello\n'))).toThrow(/no device events/);
  expect(() => readDeviceTrace(fileOf('e.log', '1@2:virtio_mem_plug_request addr=0x1\n'))).toThrow(
    /e\.log:1: fields missing/,
  );
});
