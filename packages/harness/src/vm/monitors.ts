/** Monitors on unix sockets and on standard input and output. Node only. */
import { existsSync, lstatSync, unlinkSync } from 'node:fs';
import { createServer, type Server, type Socket } from 'node:net';
import { createInterface } from 'node:readline';
import { UserError } from '../trace/trace.ts';
import { EBB_VERSION } from '../version.ts';

/** The VM as its monitors reach it: in a worker, so that every call is answered later. */
export interface MonitorApi {
  hmp(line: string): Promise<string>;
  openQmp(): Promise<{ id: number; greeting: string }>;
  feedQmp(id: number, text: string): Promise<{ text: string; negotiated: boolean }>;
  closeQmp(id: number): Promise<void>;
}

const BANNER = `Ebb ${EBB_VERSION} monitor - type 'help' for more information\n`;
const PROMPT = '(qemu) ';

/** Where events go: to every connection that has negotiated. */
export class QmpClients {
  readonly #writers = new Set<(text: string) => void>();

  broadcast(text: string): void {
    for (const write of this.#writers) write(text);
  }

  /** Serves one client over `write`; returns what takes its input and what says that it is gone. */
  async serve(
    api: MonitorApi,
    write: (text: string) => void,
  ): Promise<{ feed(text: string): Promise<void>; close(): Promise<void> }> {
    const { id, greeting } = await api.openQmp();
    write(greeting);
    // One request after the other: answers come in the order of the questions.
    let last: Promise<void> = Promise.resolve();
    return {
      feed: (text) => {
        last = last.then(async () => {
          const answer = await api.feedQmp(id, text);
          write(answer.text);
          if (answer.negotiated) this.#writers.add(write);
        });
        return last;
      },
      close: async () => {
        this.#writers.delete(write);
        await api.closeQmp(id);
      },
    };
  }
}

/** A socket that is listened on. */
export interface Listener {
  /** Hangs up on everybody and stops listening. */
  close(): void;
}

/** Listens on a unix socket; clients come and go, and may vanish at any moment. */
export async function listen(
  path: string,
  mode: 'readline' | 'control',
  api: MonitorApi,
  clients: QmpClients,
): Promise<Listener> {
  // A socket that an earlier run left behind is in the way; any other file is the user's.
  if (existsSync(path) && lstatSync(path).isSocket()) unlinkSync(path);
  const sockets = new Set<Socket>();
  const server: Server = createServer((socket) => {
    sockets.add(socket);
    socket.once('close', () => sockets.delete(socket));
    socket.setEncoding('utf8');
    socket.on('error', () => socket.destroy());
    const write = (text: string): void => {
      if (socket.writable) socket.write(text);
    };
    (mode === 'control'
      ? serveControl(socket, write, api, clients)
      : serveReadline(socket, write, api)
    ).catch(() => socket.destroy());
  });
  return new Promise((resolve, reject) => {
    server.once('error', (error) => reject(new UserError(`${path}: cannot listen: ${error.message}`)));
    const close = (): void => {
      for (const socket of sockets) socket.destroySoon();
      server.close();
    };
    // As a path: a number alone would be a TCP port.
    server.listen({ path }, () => resolve({ close }));
  });
}

async function serveControl(
  socket: Socket,
  write: (text: string) => void,
  api: MonitorApi,
  clients: QmpClients,
): Promise<void> {
  const client = await clients.serve(api, write);
  socket.on('data', (text: string) => void client.feed(text).catch(() => socket.destroy()));
  socket.once('close', () => void client.close().catch(() => undefined));
}

async function serveReadline(socket: Socket, write: (text: string) => void, api: MonitorApi): Promise<void> {
  write(BANNER + PROMPT);
  const lines = createInterface({ input: socket });
  for await (const line of lines) write((await api.hmp(line)) + PROMPT);
}

/** The human monitor on standard input and output, until either ends. Echoes lines that no terminal echoes. */
export async function serveStdio(api: MonitorApi, isOver: () => boolean): Promise<void> {
  const { stdin, stdout } = process;
  stdout.write(BANNER + PROMPT);
  const lines = createInterface({ input: stdin, terminal: false });
  for await (const line of lines) {
    if (!stdin.isTTY) stdout.write(`${line}\n`);
    stdout.write(await api.hmp(line));
    if (isOver() || /^\s*q(uit)?\s*$/.test(line)) break;
    stdout.write(PROMPT);
  }
  lines.close();
}

/** QMP on standard input and output. */
export async function serveStdioQmp(api: MonitorApi, clients: QmpClients): Promise<void> {
  const client = await clients.serve(api, (text) => process.stdout.write(text));
  process.stdin.setEncoding('utf8');
  for await (const text of process.stdin) await client.feed(text as string);
  await client.close();
}
