/** The command as a user meets it: exit codes, one-line mistakes, JSON. */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, onTestFinished, test } from 'vitest';
import { compareSchema } from './compare/schema.ts';

const CLI = join(import.meta.dirname, 'cli.ts');
const ebb = (...args: string[]): { status: number | null; stdout: string; stderr: string } => {
  const { status, stdout, stderr } = spawnSync(process.execPath, ['--conditions=ebb-source', CLI, ...args], {
    encoding: 'utf8',
    timeout: 55_000,
  });
  return { status, stdout, stderr };
};

describe('a user’s mistake is one line that names the value, and exit code 2', () => {
  test.each([
    [['compare', '--host-memory', 'lots'], /'lots'/],
    [['compare', '--host-memory', '100G'], /100G/],
    [['compare', '--technique', 'magic'], /magic/],
    [['compare', '--report', '/'], /'\/': cannot be written: is a folder/],
    [['run', 'balloon', '--trace-out', 'out/'], /'out\/': cannot be written: is a folder/],
    [['run', 'balloon', '--profile', 'broken'], /--profile is for exhibits/],
    [['run', 'firecracker-6167', '--seed', '5'], /takes --profile and --json, nothing else/],
    [['compare', '--guest-memory', '64M'], /64M.*captured with 512 MiB/],
    [['compare', '--vms', '0'], /--vms 0/],
    [['compare', '--repeat', 'many'], /--repeat many/],
    [['compare', '--trace', 'nowhere'], /'nowhere'.*build, hog, reporting/],
    [['compare', '--backing', 'silk'], /silk/],
    [['run', 'nothing'], /'nothing'.*pressure/],
    [['trace', 'import', '/no/such/file'], /\/no\/such\/file/],
    [['frobnicate'], /frobnicate/],
    [['compare', '--no-such-option'], /--no-such-option/],
  ])('%j', (args, message) => {
    const { status, stderr, stdout } = ebb(...args);
    expect(status).toBe(2);
    expect(stderr.trim().split('\n').length).toBe(1);
    expect(stderr).toMatch(message);
    expect(stdout).toBe('');
  });
  test('a corrupt trace: line number and offending text', () => {
    const folder = mkdtempSync(join(tmpdir(), 'ebb-test-'));
    onTestFinished(() => rmSync(folder, { recursive: true }));
    const file = join(folder, 'bad.txt');
    writeFileSync(file, '# tracer: nop\n  init-1 [000] ..... 1.0: mm_page_alloc: page=1 pfn=0xzz order=0\n');
    const { status, stderr } = ebb('trace', 'info', file);
    expect(status).toBe(2);
    expect(stderr).toMatch(/bad\.txt: line 2: no valid pfn=.*0xzz/);
  });
});

test('--help has examples and exit codes', () => {
  const { status, stdout } = ebb('--help');
  expect(status).toBe(0);
  expect(stdout).toMatch(/Examples:[\s\S]*ebb compare[\s\S]*Exit codes/);
  for (const command of ['compare', 'run', 'list'])
    expect(ebb(command, '--help').stdout).toMatch(/Examples:/);
});

test('compare --json - writes exactly one document that fits the published schema; a run that fails under --vms is exit code 1', () => {
  const fine = ebb(
    'compare',
    '--technique',
    'none,reporting',
    '--vms',
    '1',
    '--repeat',
    '1',
    '--host-memory',
    '640M',
    '--schedule',
    'inline',
    '--json',
    '-',
  );
  expect(fine.status).toBe(0);
  const json = compareSchema.parse(JSON.parse(fine.stdout));
  expect(json.results.map((r) => [r.technique, r.vmsFit, r.ledgerViolations])).toEqual([
    ['none', 1, 0],
    ['reporting', 1, 0],
  ]);
  expect(json.results[1].returnedBytes).toBeGreaterThan(100e6);
  const tight = ebb(
    'compare',
    '--technique',
    'none',
    '--vms',
    '2',
    '--repeat',
    '1',
    '--host-memory',
    '640M',
    '--schedule',
    'inline',
    '--json',
    '-',
  );
  expect(tight.status).toBe(1);
  expect(compareSchema.parse(JSON.parse(tight.stdout)).results[0].failure).toMatch(
    /no host frame was free|no memory to start/,
  );
  // For people, whether they fit and not how many.
  expect(fine.stderr).toMatch(/1 VMs fit[^]*reporting │\s+yes │/);
  expect(tight.stderr).toMatch(/2 VMs fit[^]*none\s+│\s+no │/);
});
