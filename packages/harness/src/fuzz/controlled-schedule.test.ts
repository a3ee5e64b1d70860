/** The schedule by itself: what it calls a deadlock or a livelock, whom it wakes, and that choices are all there is to it. */
import { once } from 'node:events';
import { Worker } from 'node:worker_threads';
import { describe, expect, test } from 'vitest';
import { ScheduleBuffer, type ScheduleOutcome, type ScheduleStart } from '@ebb/machine';

/**
 * What a thread does, in order. `point`: a point of that name; `until`: spins until word n of the shared flags is set; `set`: a
 * store point, then sets it; `for ever`: spins, whatever the others do; `sleep` and `wake` on word n.
 */
type Op = readonly [what: 'point' | 'until' | 'set' | 'for ever' | 'sleep' | 'wake', n: number];

const THREAD = `
  const { parentPort, workerData } = require('node:worker_threads');
  const { module, buffer, flags, thread, program } = workerData;
  import(module).then(({ ControlledSchedule }) => {
    const schedule = new ControlledSchedule(buffer, thread);
    const woken = [];
    try {
      schedule.start();
      for (const [what, n] of program) {
        if (what === 'point') schedule.point('lock', n);
        else if (what === 'until') while (Atomics.load(flags, n) === 0) schedule.spin('spin', n);
        else if (what === 'for ever') for (;;) schedule.spin('spin', n);
        else if (what === 'set') { schedule.point('store', n); Atomics.store(flags, n, 1); }
        else if (what === 'sleep') schedule.sleep(n);
        else woken.push(schedule.wake(n));
      }
      schedule.end();
      parentPort.postMessage(woken);
    } catch (error) {
      parentPort.postMessage(error.name);
    }
  });
`;

interface Execution extends ScheduleOutcome {
  /** Threads of the points `lock`, with their numbers, as they came. */
  readonly order: readonly string[];
  /** Of each thread: how many it woke, each time; or the error that ended it. */
  readonly ends: readonly unknown[];
}

async function execute(
  programs: readonly (readonly Op[])[],
  start: Partial<ScheduleStart> = {},
): Promise<Execution> {
  const shared = new ScheduleBuffer();
  shared.prepare({
    threads: programs.length,
    strategy: 'none',
    seed: 1,
    depth: 0,
    length: 20,
    limit: 500,
    choices: [],
    ...start,
  });
  const flags = new Int32Array(new SharedArrayBuffer(64));
  const module = new URL('../../../machine/src/controlled-schedule.ts', import.meta.url).href;
  const workers = programs.map(
    (program, thread) =>
      new Worker(THREAD, {
        eval: true,
        workerData: { module, buffer: shared.buffer, flags, thread, program },
      }),
  );
  const ends = await Promise.all(workers.map(async (w) => ((await once(w, 'message')) as unknown[])[0]));
  await Promise.all(workers.map((w) => w.terminate()));
  const order = shared.events().flatMap((e) => (e.point === 'lock' ? [`${e.thread}:${e.detail}`] : []));
  return { ...shared.outcome(), order, ends };
}

const points = (...details: number[]): Op[] => details.map((n) => ['point', n] as const);

describe('choices', () => {
  const two = [points(1, 2, 3, 4), points(5, 6, 7, 8)];
  test('without a strategy a thread runs until it ends; a choice given in advance hands over', async () => {
    expect((await execute(two)).order).toEqual(['0:1', '0:2', '0:3', '0:4', '1:5', '1:6', '1:7', '1:8']);
    const one = await execute(two, { choices: [0, 0, 1] });
    expect(one.order).toEqual(['0:1', '0:2', '1:5', '1:6', '1:7', '1:8', '0:3', '0:4']);
    expect(one.choices.slice(0, 3)).toEqual([0, 0, 1]);
    expect(one.preemptive.slice(0, 3)).toEqual([true, true, true]);
  });
  test('one seed, one interleaving; its choices replay it; another seed is another', async () => {
    const runs = [];
    for (const seed of [7, 7, 8, 9]) runs.push(await execute(two, { strategy: 'random', seed }));
    expect(runs[1]).toEqual(runs[0]);
    expect(new Set(runs.map((r) => r.order.join())).size).toBeGreaterThan(1);
    const again = await execute(two, { choices: runs[2].choices });
    expect([again.hash, again.order, again.steps]).toEqual([runs[2].hash, runs[2].order, runs[2].steps]);
  });
  test('the hash tells who did what to which word', async () => {
    const hash = async (...programs: Op[][]): Promise<number> => (await execute(programs)).hash;
    const hashes = [
      await hash(points(1), points(2)),
      await hash(points(2), points(1)),
      await hash(points(1), points(3)),
      await hash([['set', 1]], points(2)),
    ];
    expect(new Set(hashes).size).toBe(4);
    expect(await hash(points(1), points(2))).toBe(hashes[0]);
  });
});

describe('waits', () => {
  test('a sleeper goes on when its word is told of, not another; who wakes learns how many', async () => {
    const run = await execute([
      [['sleep', 4], ...points(1)],
      [['sleep', 5], ...points(2)],
      [['wake', 6], ...points(3), ['wake', 5], ...points(4), ['wake', 4]],
    ]);
    expect([run.failure, run.ends]).toEqual(['', [[], [], [0, 1, 1]]]);
    expect(run.order).toEqual(['2:3', '2:4', '0:1', '1:2']);
  });
  test('a wake-up before the sleep is lost: a deadlock, with the place of each thread', async () => {
    const run = await execute([[['wake', 4]], [['sleep', 4]]]);
    expect(run.failure).toBe('deadlock');
    expect(run.positions).toEqual([expect.stringMatching(/^ended/), 'asleep at wait 4']);
    expect(run.ends).toEqual([[0], 'ScheduleAborted']);
  });
  test('two that spin for each other are a deadlock: a spin is no progress', async () => {
    const run = await execute([[['until', 0]], [['until', 1]]]);
    expect(run.failure).toBe('deadlock');
    expect(run.positions).toEqual(['spinning at spin 0', 'spinning at spin 1']);
  });
  test('a spinner looks again after each step that may have changed something', async () => {
    const run = await execute([
      [['until', 0], ...points(1)],
      [...points(2, 3), ['set', 0], ...points(4)],
    ]);
    expect([run.failure, run.order.at(-1), run.order.length]).toEqual(['', '0:1', 4]);
  });
  // A point comes before its operation: control may pass between the two. This was once called a deadlock.
  test('a spinner that looked before another thread’s store took effect looks again', async () => {
    const programs: Op[][] = [
      [
        ['set', 0],
        ['until', 1],
      ],
      [
        ['until', 0],
        ['set', 1],
      ],
    ];
    // Go on at the start; hand over at the store. The spinner has looked then, and from here on all only spin.
    const run = await execute(programs, { choices: [0, 1] });
    expect([run.failure, run.ends]).toEqual(['', [[], []]]);
    expect(run.positions).toEqual([expect.stringContaining('ended'), expect.stringContaining('ended')]);
  });
  test('who goes on for ever while others make progress is a livelock, after as many steps as allowed', async () => {
    const run = await execute(
      [
        [['for ever', 3]],
        [['for ever', 4], ...points(1)],
        Array.from({ length: 400 }, () => ['point', 1] as const),
      ],
      {
        strategy: 'random',
        limit: 300,
      },
    );
    expect(run.failure).toBe('livelock');
    expect(run.steps).toBeGreaterThan(300);
    expect(run.steps).toBeLessThan(310);
    expect(run.ends).toEqual(['ScheduleAborted', 'ScheduleAborted', 'ScheduleAborted']);
  });
});

test('PCT: the thread of highest priority runs until it waits or a change point drops it below all others', async () => {
  const two = [points(1, 2, 3, 4), points(5, 6, 7, 8)];
  // Without a change point each runs through, in one order or the other.
  const orders = new Set<string>();
  for (let seed = 0; seed < 8; seed++) {
    const { order, switches } = await execute(two, { strategy: 'pct', seed, depth: 0 });
    orders.add(order.join(' '));
    expect(switches).toBeLessThanOrEqual(1);
  }
  expect([...orders].toSorted()).toEqual([
    '0:1 0:2 0:3 0:4 1:5 1:6 1:7 1:8',
    '1:5 1:6 1:7 1:8 0:1 0:2 0:3 0:4',
  ]);
  const changed: number[] = [];
  for (let seed = 0; seed < 8; seed++)
    changed.push((await execute(two, { strategy: 'pct', seed, depth: 1, length: 6 })).switches);
  expect(Math.max(...changed)).toBe(2);
});
