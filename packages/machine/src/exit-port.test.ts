import { expect, test } from 'vitest';
import { RunStopped, ThreadExitPort } from './exit-port.ts';
import {
  EXIT_DONE,
  EXIT_REQUEST,
  EXIT_REQUEST_SLEEPING,
  RC_STOP,
  RUN_CONTROL_BYTES,
  VC_EXIT_STATE,
  VCPU_BLOCK_BYTES,
} from './layout.ts';

/** An exit at `state` through a port that looks `spins` times before it sleeps: the mailbox's state after it, and what it threw. */
function call(state: number, spins: number, stop: number): readonly [state: number, thrown: unknown] {
  const control = new Int32Array(new SharedArrayBuffer(VCPU_BLOCK_BYTES));
  const run = new Int32Array(new SharedArrayBuffer(RUN_CONTROL_BYTES));
  control[VC_EXIT_STATE] = state;
  run[RC_STOP] = stop;
  try {
    new ThreadExitPort(run, spins).call(control, 0);
  } catch (thrown) {
    return [control[VC_EXIT_STATE], thrown];
  }
  return [control[VC_EXIT_STATE], undefined];
}

test('an exit that is answered returns, and announces no sleep', () => {
  expect(call(EXIT_DONE, 1, 0)).toEqual([EXIT_DONE, undefined]);
});

test('an answer is taken even if the run has been stopped', () => {
  expect(call(EXIT_DONE, 1, 1)).toEqual([EXIT_DONE, undefined]);
});

test('a vCPU that waits for an answer leaves when the run is stopped: while it spins, and while it sleeps', () => {
  const stopped = expect.any(RunStopped) as unknown;
  expect(call(EXIT_REQUEST, 2, 1)).toEqual([EXIT_REQUEST, stopped]);
  expect(call(EXIT_REQUEST, 0, 1)).toEqual([EXIT_REQUEST_SLEEPING, stopped]);
});
