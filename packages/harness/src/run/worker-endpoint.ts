/**
 * Comlink over Node's worker threads, main's side: spawning, an endpoint, and the worker's death as a promise. A Comlink
 * call to a dead worker never settles, so every call is raced against `died`.
 */
import { flushCompileCache } from 'node:module';
import { Worker } from 'node:worker_threads';
import { wrap, type Endpoint, type Remote } from 'comlink';

/** A worker died: its name and cause. The command ends with exit code 3. */
export class WorkerDied extends Error {
  constructor(name: string, cause: string) {
    super(`worker '${name}' died: ${cause}`);
    this.name = 'WorkerDied';
  }
}

/** What was thrown, as one line; anything can be. */
export function causeOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

export interface SpawnedWorker<Api> {
  readonly name: string;
  readonly api: Remote<Api>;
  /** Rejects with `WorkerDied` when the worker ends before `close`. */
  readonly died: Promise<never>;
  close(): Promise<void>;
}

/** `worker_threads.Worker` is an EventEmitter; Comlink wants an EventTarget. */
function endpointOf(worker: Worker): Endpoint {
  const handlers = new Map<unknown, (data: unknown) => void>();
  return {
    postMessage: (message: unknown, transfer?: unknown[]) => {
      worker.postMessage(message, (transfer ?? []) as never);
    },
    addEventListener(_type: string, listener: unknown) {
      const handle = (data: unknown): void => {
        if (typeof listener === 'function') (listener as (event: { data: unknown }) => void)({ data });
        else (listener as { handleEvent(event: { data: unknown }): void }).handleEvent({ data });
      };
      handlers.set(listener, handle);
      worker.on('message', handle);
    },
    removeEventListener(_type: string, listener: unknown) {
      const handle = handlers.get(listener);
      if (handle !== undefined) worker.off('message', handle);
      handlers.delete(listener);
    },
  };
}

/** Sources run as they are, published packages from their build. */
const EXTENSION = import.meta.url.endsWith('.ts') ? '.ts' : '.js';

/** Starts the worker whose module is `file` (relative to this one, no extension) under `name`. */
export function spawnWorker<Api>(file: string, name: string): SpawnedWorker<Api> {
  // What this thread has stripped of its types, the new one need not (see bin/launch.mjs).
  flushCompileCache();
  const worker = new Worker(new URL(file + EXTENSION, import.meta.url), { name });
  let closing = false;
  const died = new Promise<never>((_, reject) => {
    worker.once('error', (error: unknown) => {
      if (!closing) reject(new WorkerDied(name, causeOf(error)));
    });
    worker.once('exit', (code) => {
      if (!closing) reject(new WorkerDied(name, `it exited with code ${code}`));
    });
  });
  died.catch(() => undefined);
  return {
    name,
    api: wrap<Api>(endpointOf(worker)),
    died,
    async close() {
      closing = true;
      await worker.terminate();
    },
  };
}
