/** The controlled schedule on real workers: deterministic, replayable, exhaustive where asked. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { execute, exhaustive, Runs, SEARCHES } from './explore.ts';
import { fuzz } from './fuzz.ts';
import { PROPERTIES } from './properties.ts';
import { Stage } from './stage.ts';
import { describeEvent, perfetto, story } from './story.ts';

const options = { seed: 11, strategy: 'mixed', preemptions: 1 } as const;

describe('invalidation', () => {
  const stage = new Stage('invalidation');
  beforeAll(() => stage.open());
  afterAll(() => stage.close());

  test('the same seed gives the same trace of events, byte for byte, twenty times', async () => {
    const run = new Runs(stage.property, options).get(4);
    const traces = new Set<string>();
    for (let i = 0; i < 20; i++) {
      const outcome = await execute(stage, run);
      expect(outcome.found).toEqual([]);
      traces.add(JSON.stringify([stage.buffer.events(), outcome.choices, outcome.hash]));
    }
    expect(traces.size).toBe(1);
  });

  test('the choices of a run replay it without its strategy', async () => {
    const run = new Runs(stage.property, options).get(6);
    const first = await execute(stage, run);
    const again = await execute(stage, { ...run, strategy: 'none' }, first.choices);
    expect(again.hash).toBe(first.hash);
    expect(first.switches).toBeGreaterThan(10);
  });

  test('runs go on to other programs, and races are looked for in a part of them', () => {
    const runs = new Runs(stage.property, options);
    const drawn = Array.from({ length: 64 }, (_, n) => runs.get(n));
    expect(new Set(drawn.map((run) => JSON.stringify(run.program))).size).toBeGreaterThan(48);
    expect(drawn.filter((run) => run.observe)).toHaveLength(16);
  });

  test('other seeds and strategies give other interleavings of one program', async () => {
    const run = new Runs(stage.property, options).get(0);
    const hashes = new Set<number>();
    for (let seed = 0; seed < 5; seed++)
      for (const strategy of ['random', 'pct'] as const)
        hashes.add((await execute(stage, { ...run, strategy, seed })).hash);
    expect(hashes.size).toBeGreaterThan(6);
    expect(SEARCHES).toContain('exhaustive');
  });

  test('exhaustive search visits each schedule once and keeps to its preemptions', async () => {
    const program = {
      host: [{ op: 'discard', a: 0, b: 0 }],
      cpus: [[{ op: 'store', a: 0, b: 0 }], [{ op: 'load', a: 0, b: 0 }]],
    };
    const run = { program, strategy: 'none', seed: 1, depth: 0, share: 1, observe: false } as const;
    const seen = new Set<string>();
    let runs = 0;
    for await (const { outcome, choices } of exhaustive(stage, run, 1)) {
      expect(outcome.found).toEqual([]);
      const preempted = choices.filter((c, i) => c !== 0 && outcome.preemptive[i]).length;
      expect(preempted).toBeLessThanOrEqual(1);
      seen.add(choices.join(','));
      if (++runs >= 60) break;
    }
    expect(seen.size).toBe(runs);
    expect(runs).toBeGreaterThan(20);
  });

  test('a story names threads and words; the Perfetto file is one event per step', async () => {
    const run = new Runs(stage.property, options).get(2);
    await execute(stage, run);
    const events = stage.buffer.events();
    const text = story(
      { property: 'invalidation', program: run.program as never },
      events,
      ['found this'],
      10_000,
    );
    expect(text).toContain('vcpu0  begins a guest section');
    expect(text).toContain('exit mailbox');
    expect(text.trimEnd().endsWith('found this')).toBe(true);
    expect(describeEvent({ thread: 0, point: 'flush-request', detail: 1 }, 1024)).toBe(
      'asks vCPU 1 to flush',
    );
    const trace = JSON.parse(perfetto(events, [], stage.threads, stage.property.shape.ramPages)) as {
      traceEvents: unknown[];
    };
    expect(trace.traceEvents.length).toBe(events.length + stage.threads);
  });
});

test('as many runs as asked for, each once, whatever is left of the last turn', async () => {
  const result = await fuzz(
    {
      ...options,
      properties: ['queue'],
      runs: 37,
      milliseconds: 60_000,
      workers: 2,
      keepGoing: true,
      shrinkMilliseconds: 0,
    },
    () => undefined,
  );
  expect([result.runs, result.violations]).toEqual([37, 0]);
});

describe.each(PROPERTIES.map((p) => [p.name]))('%s', (name) => {
  test('holds in a few runs of a fixed seed', async () => {
    const stage = new Stage(name);
    await stage.open();
    try {
      const runs = new Runs(stage.property, { seed: 5, strategy: 'mixed', preemptions: 0 });
      for (let n = 0; n < 6; n++) expect((await execute(stage, runs.get(n))).found).toEqual([]);
    } finally {
      await stage.close();
    }
  });
});
