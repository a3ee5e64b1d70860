import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { writeTraces } from './cli-output.ts';

test('traces of several VMs go into files of their own, a VM alone needs no number', () => {
  const folder = mkdtempSync(join(tmpdir(), 'traces-'));
  const alloc = (vm: number, seconds: string): string =>
    `       ebb-vm${vm}-1  [000] ..... ${seconds}: mm_page_free: page=1 pfn=0x1 order=0`;
  writeTraces(join(folder, 'one'), [alloc(0, '2.0'), alloc(0, '1.0')], ['0@1.000000:x']);
  writeTraces(join(folder, 'two'), [alloc(0, '1.0'), alloc(1, '1.5')], ['1@2.000000:y']);
  expect(readdirSync(folder).toSorted()).toEqual([
    'one.qemu-trace.log',
    'one.trace.txt',
    'two.vm0.qemu-trace.log',
    'two.vm0.trace.txt',
    'two.vm1.qemu-trace.log',
    'two.vm1.trace.txt',
  ]);
  const text = (name: string): string => readFileSync(join(folder, name), 'utf8');
  expect(text('one.trace.txt')).toBe(`# tracer: nop\n#\n${alloc(0, '1.0')}\n${alloc(0, '2.0')}\n`);
  expect(text('two.vm1.trace.txt')).toContain(alloc(1, '1.5'));
  expect([text('two.vm0.qemu-trace.log').trim(), text('two.vm1.qemu-trace.log').trim()]).toEqual([
    '',
    '1@2.000000:y',
  ]);
  rmSync(folder, { recursive: true });
});
