/**
 * An example: our memory device and balloon for a guest that is not ours. The guest runs in an emulator or another VMM; its
 * RAM is a file that both map, and its accesses to virtio-mmio registers come over a unix socket, a line each:
 *
 * | line | answer | meaning |
 * | --- | --- | --- |
 * | `R device offset width` | a number | register read |
 * | `W device offset width value` | `ok` | register write; answered when the device has done what it caused |
 * | `S device bytes` | `ok` | the host asks for a size: of the memory device, or left by the balloon |
 * | `stats` | `ok` | the balloon asks for statistics |
 * | `hint start`, `hint stop` | `ok`, pages | a round of free page hinting |
 * | `reset` | `ok` | the machine is reset: both devices, and what is plugged goes |
 * | `figures` | JSON | sizes asked for and reached, statistics |
 * | | `! device`, `~ device` | the device's interrupt line was raised, or fell (before the answer that follows) |
 *
 * Device 0 is the memory device, 1 the balloon; numbers are decimal or 0x-hexadecimal. Anything else is answered `error`.
 * `qemu/bridge.ts` carries a stock QEMU's accesses here.
 *
 *     node --conditions=ebb-source packages/harness/src/examples/foreign-guest.ts RAM-FILE SOCKET REGION-ADDR REGION-BYTES
 */
import { openSync } from 'node:fs';
import { createServer, type Server } from 'node:net';
import { createInterface } from 'node:readline';
import { pathToFileURL } from 'node:url';
import { BalloonDevice, HostTasks, MemoryDevice, type DevicePort, type TaskYield } from '@ebb/host-kvm';
import { COST_TABLE, freeSchedule, MiB, PAGE_SIZE } from '@ebb/machine';
import { MmioTransport } from '@ebb/virtio/device';
import { MMIO_INTERRUPT_STATUS } from '@ebb/virtio/uapi';
import { FileMemory } from './file-memory.ts';

export interface ForeignGuestOptions {
  /** The guest's RAM: byte n of the file is guest-physical address n. */
  readonly ram: string;
  readonly regionAddr: number;
  readonly regionBytes: number;
  /** Features of the balloon; all without it. */
  readonly balloonFeatures?: readonly number[];
}

/** The two devices behind lines of text; `tell` hears of interrupts. */
export class ForeignGuest {
  readonly memory: FileMemory;
  readonly device: MemoryDevice;
  readonly balloon: BalloonDevice;
  readonly #transports: readonly MmioTransport[];
  readonly #tasks = new HostTasks(freeSchedule);
  readonly #tell: (line: string) => void;
  /** Devices whose line is up. */
  readonly #raised = new Set<number>();

  constructor(options: ForeignGuestOptions, tell: (line: string) => void) {
    this.#tell = tell;
    const memory = new FileMemory(openSync(options.ram, 'r+'));
    const port: DevicePort = {
      spawn: (name, body) => void this.#tasks.spawn(name, body),
      now: () => 0,
      costs: COST_TABLE,
    };
    const discard = function* (gfn: number, count: number): Generator<TaskYield, number, void> {
      yield undefined;
      memory.zero(gfn, count);
      return count;
    };
    this.memory = memory;
    this.device = new MemoryDevice({
      port,
      id: 'vm0',
      addr: options.regionAddr,
      regionBytes: options.regionBytes,
      blockBytes: 2 * MiB,
      node: 0,
      requestedBytes: 0,
      region: {
        pageBytes: PAGE_SIZE,
        discard,
        // Whoever maps the file keeps its own page tables.
        *unmap() {},
      },
    });
    this.balloon = new BalloonDevice({
      port,
      ...(options.balloonFeatures === undefined ? {} : { features: options.balloonFeatures }),
      memory: {
        ramPages: options.regionAddr / PAGE_SIZE,
        // Linux takes movable pages first, and plugged memory may be all of that.
        endPfn: (options.regionAddr + options.regionBytes) / PAGE_SIZE,
        unitPages: 1,
        *discard(runs, nrRuns) {
          let freed = 0;
          for (let r = 0; r < nrRuns; r++) freed += yield* discard(runs[2 * r], runs[2 * r + 1]);
          return freed;
        },
      },
    });
    this.#transports = [this.device, this.balloon].map(
      (device, line) =>
        new MmioTransport({
          device,
          memory,
          interrupt: () => {
            memory.flush();
            this.#raised.add(line);
            tell(`! ${line}`);
          },
        }),
    );
  }

  /** Carries one line out; the answer. */
  line(text: string): string {
    const [command, ...words] = text.trim().split(/\s+/);
    const answer =
      command === 'R' || command === 'W' || command === 'S'
        ? this.#toDevice(command, words.map(Number))
        : this.#toHost(text.trim());
    this.#lower();
    return answer;
  }

  #toDevice(command: 'R' | 'W' | 'S', [device = -1, ...numbers]: readonly number[]): string {
    const transport = this.#transports.at(device);
    if (transport === undefined || device < 0 || numbers.some((n) => !Number.isFinite(n))) return 'error';
    const [offset = 0, width = 0, value = 0] = numbers;
    if (command === 'R') return `0x${transport.read(offset, width).toString(16)}`;
    if (command === 'W') transport.write(offset, width, value);
    else if (device === 1) this.balloon.setTarget(offset);
    else if (offset % (2 * MiB) === 0 && offset <= this.device.regionBytes) this.device.setRequested(offset);
    else return 'error';
    this.#work();
    return 'ok';
  }

  #toHost(request: string): string {
    let done = true;
    switch (request) {
      case 'stats':
        done = this.balloon.requestStats();
        break;
      case 'hint start':
        done = this.balloon.startHinting();
        break;
      case 'hint stop':
        return String(this.balloon.stopHinting().count());
      case 'reset':
        for (const transport of this.#transports) transport.reset();
        this.#tasks.spawn('reset', this.device.systemReset('virtio-1.2'));
        break;
      case 'figures': {
        const { requestedBytes, pluggedBytes } = this.device;
        return JSON.stringify({
          requestedBytes,
          pluggedBytes,
          balloonPages: this.balloon.actual,
          stats: this.balloon.stats,
        });
      }
      default:
        done = false;
    }
    this.#work();
    return done ? 'ok' : 'error';
  }

  /** Lets the devices work until nothing is left to do. */
  #work(): void {
    while (this.#tasks.step());
    this.memory.flush();
  }

  /** Level-triggered lines fall when nothing is pending any more. */
  #lower(): void {
    for (const line of this.#raised) {
      if (this.#transports[line].read(MMIO_INTERRUPT_STATUS, 4) !== 0) continue;
      this.#raised.delete(line);
      this.#tell(`~ ${line}`);
    }
  }
}

/** Serves a guest on a unix socket, one connection at a time. */
export function serveForeignGuest(options: ForeignGuestOptions, socketPath: string): Server {
  let write: (line: string) => void = () => undefined;
  const guest = new ForeignGuest(options, (line) => write(line));
  const server = createServer((socket) => {
    write = (line) => void socket.write(`${line}\n`);
    socket.on('error', () => socket.destroy());
    createInterface({ input: socket }).on('line', (line) => write(guest.line(line)));
  });
  return server.listen(socketPath);
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) {
  const [ram, socketPath, addr, bytes] = process.argv.slice(2);
  if (bytes === undefined) {
    process.stderr.write('usage: foreign-guest RAM-FILE SOCKET REGION-ADDR REGION-BYTES\n');
    process.exitCode = 2;
  } else serveForeignGuest({ ram, regionAddr: Number(addr), regionBytes: Number(bytes) }, socketPath);
}
