/** One of two threads that hand over to each other at every point of a controlled schedule. */
import { ControlledSchedule } from '@ebb/machine';
import { exposeToParent } from '../run/worker-port.ts';

export class HandoverWorker {
  /** Passes `points` points; nanoseconds it took. */
  run(buffer: SharedArrayBuffer, thread: number, points: number): number {
    const schedule = new ControlledSchedule(buffer, thread);
    schedule.start();
    const began = performance.now();
    for (let i = 0; i < points; i++) schedule.point('section', i);
    const ns = (performance.now() - began) * 1e6;
    schedule.end();
    return ns;
  }
}

exposeToParent(new HandoverWorker());
