import { once } from 'node:events';
import { Worker } from 'node:worker_threads';
import { expect, test } from 'vitest';
import { ControlledSchedule, ScheduleBuffer } from '@ebb/machine';

/** A thread that spins until the first flag is set, and sets the second. */
const SPINNER = `
  const { parentPort, workerData } = require('node:worker_threads');
  const { module, buffer, flag } = workerData;
  import(module).then(({ ControlledSchedule }) => {
    const schedule = new ControlledSchedule(buffer, 1);
    try {
      schedule.start();
      while (Atomics.load(flag, 0) === 0) schedule.spin('spin', 1);
      schedule.point('store', 2);
      Atomics.store(flag, 1, 1);
      schedule.end();
      parentPort.postMessage('saw it');
    } catch (error) {
      parentPort.postMessage(error.message);
    }
  });
`;

// A point comes before its operation: control may pass between the two. This was once called a deadlock.
test('a spinner that looked before another thread’s store took effect looks again', async () => {
  const shared = new ScheduleBuffer();
  shared.prepare({
    threads: 2,
    strategy: 'none',
    seed: 1,
    depth: 0,
    length: 10,
    limit: 1000,
    // Go on at the start; hand over at the store.
    choices: [0, 1],
  });
  const flag = new Int32Array(new SharedArrayBuffer(8));
  const module = new URL('../../../machine/src/controlled-schedule.ts', import.meta.url).href;
  const spinner = new Worker(SPINNER, { eval: true, workerData: { module, buffer: shared.buffer, flag } });
  const said = once(spinner, 'message');
  const schedule = new ControlledSchedule(shared.buffer, 0);
  schedule.start();
  schedule.point('store', 1);
  // The spinner has looked, and waits for something to change. So do we from here on, and a spin changes nothing.
  Atomics.store(flag, 0, 1);
  while (Atomics.load(flag, 1) === 0) schedule.spin('spin', 2);
  schedule.end();
  expect(await said).toEqual(['saw it']);
  expect(shared.outcome().positions).toEqual([
    expect.stringContaining('ended'),
    expect.stringContaining('ended'),
  ]);
  await spinner.terminate();
});
