import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { PROPERTIES } from '../fuzz/properties.ts';
import { EQUIVALENT, MUTANTS } from './catalogue.ts';
import { ROOT } from './scratch.ts';

test('at least 60 faults, named once', () => {
  expect(MUTANTS.length).toBeGreaterThanOrEqual(60);
  expect(new Set(MUTANTS.map((m) => m.name)).size).toBe(MUTANTS.length);
  for (const e of EQUIVALENT) expect(e.reason.length).toBeGreaterThan(40);
});

test.each(MUTANTS.map((m) => [m.name, m] as const))(
  '%s: its text is there once, and its catcher exists',
  (_name, m) => {
    expect(readFileSync(join(ROOT, m.file), 'utf8').split(m.find).length - 1).toBe(1);
    expect(m.replace).not.toBe(m.find);
    if ('properties' in m.by)
      for (const p of m.by.properties) expect(PROPERTIES.map((x) => x.name)).toContain(p);
    else expect(existsSync(join(ROOT, m.by.test)), m.by.test).toBe(true);
  },
);
