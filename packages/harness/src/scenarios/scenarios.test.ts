/** Every scenario holds its own checks on the inline schedule; some, in real threads as well (`.ci/run` runs all of them so). */
import { describe, expect, test } from 'vitest';
import { findScenario, runScenario } from './run-scenario.ts';
import { SCENARIOS } from './scenarios.ts';

async function passes(name: string, schedule: 'inline' | 'threads'): Promise<void> {
  const run = await runScenario(findScenario(name), { schedule, seed: 1, traceOut: false });
  expect(run.outcome.result.violations).toEqual([]);
  expect(run.checks.filter((c) => !c.ok)).toEqual([]);
}

describe('inline', () => {
  test.each(SCENARIOS.map((s) => s.name))('%s passes', (name) => passes(name, 'inline'));
});

describe('in real threads', () => {
  test.each(['balloon', 'reporting', 'hinting'])('%s passes', (name) => passes(name, 'threads'));
});
