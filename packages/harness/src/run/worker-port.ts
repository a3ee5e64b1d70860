/** The worker's own end of Comlink: `parentPort` speaks messages, Comlink speaks events. */
import { parentPort } from 'node:worker_threads';
import { expose, type Endpoint } from 'comlink';
import { assert } from '@ebb/machine';

/** Offers `api` to the thread that started this worker. */
export function exposeToParent(api: object): void {
  const port = parentPort;
  assert(port !== null, 'runs as a worker');
  const endpoint: Endpoint = {
    postMessage: (message: unknown, transfer?: unknown[]) => port.postMessage(message, transfer as never[]),
    addEventListener: (_type: string, listener: unknown) => {
      port.on('message', (data: unknown) => (listener as (event: { data: unknown }) => void)({ data }));
    },
    removeEventListener: () => undefined,
    start: () => undefined,
  };
  expose(api, endpoint);
}

/** Lets the event loop turn once, so that Comlink and progress work during a long run. */
export function turn(): Promise<void> {
  return new Promise((resolve) => {
    setImmediate(resolve);
  });
}
