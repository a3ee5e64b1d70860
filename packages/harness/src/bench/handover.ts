/** Prints the nanoseconds of one hand-over of the controlled schedule. A process of its own, so that it can be pinned. */
import { ScheduleBuffer } from '@ebb/machine';
import { spawnWorker } from '../run/worker-endpoint.ts';
import type { HandoverWorker } from './handover-worker.ts';

/** Hand-overs of one round: as many choices as can be given in advance. */
const SWITCHES = 16_000;

const workers = [0, 1].map((t) => spawnWorker<HandoverWorker>('../bench/handover-worker', `thread${t}`));
const schedule = new ScheduleBuffer();
let best = Number.POSITIVE_INFINITY;
for (let round = 0; round < 5; round++) {
  schedule.prepare({
    threads: 2,
    strategy: 'none',
    seed: 1,
    depth: 0,
    length: 1,
    choices: new Array<number>(SWITCHES).fill(1),
    limit: 4 * SWITCHES,
  });
  const [first] = await Promise.all(workers.map((w, t) => w.api.run(schedule.buffer, t, SWITCHES / 2)));
  best = Math.min(best, first / schedule.outcome().switches);
}
await Promise.all(workers.map((w) => w.close()));
process.stdout.write(`${best.toFixed(1)}\n`);
