import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, expect, test } from 'vitest';
import { caseText, readCase } from './case-file.ts';

const folder = mkdtempSync(join(tmpdir(), 'ebb-case-'));
afterAll(() => rmSync(folder, { recursive: true }));

test.each([true, false])(
  'a failing case is read back as it was written (races looked for: %s)',
  (observe) => {
    const failed = {
      property: 'invalidation',
      seed: 7,
      path: 12,
      strategy: 'pct',
      program: { host: [{ op: 'take', a: 1, b: 2 }], cpus: [[{ op: 'store', a: 3, b: 0 }], []] },
      choices: [0, 2, 0, 1],
      observe,
      found: ['stale-tlb: frame 7'],
    };
    const path = join(folder, 'case.json');
    writeFileSync(path, caseText(failed));
    expect(readCase(path)).toMatchObject(failed);
  },
);

test('what is no case is named with its place', () => {
  const path = join(folder, 'none.json');
  writeFileSync(path, '{"schema":1,"ebb":"0","property":"x","seed":"seven"}');
  expect(() => readCase(path)).toThrow(/none\.json: not a case: seed/);
});
