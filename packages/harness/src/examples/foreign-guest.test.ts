/**
 * A guest that is not ours: its RAM is a file, its register accesses are lines. The scripts are what Debian's Linux 6.1, 6.12
 * and 7.2 did with these devices in QEMU 7.2 over `qemu/bridge.ts`: every register access from discovery to unload, and
 * what the rings held at each notification. Besides the lines of `foreign-guest.ts` a script has
 *
 * | line | meaning |
 * | --- | --- |
 * | `R … = value` | the answer |
 * | `M address bytes` | the guest has put these into RAM before the next line |
 * | `A address bytes` | the device has left these after the line before |
 * | `! device` | an interrupt that the line before has raised |
 * | `# text` | a comment |
 */
import {
  existsSync,
  mkdtempSync,
  openSync,
  readFileSync,
  readSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { afterAll, describe, expect, test } from 'vitest';
import { MiB, PAGE_SIZE } from '@ebb/machine';
import { VIRTIO_BALLOON_F_REPORTING, VIRTIO_BALLOON_F_STATS_VQ } from '@ebb/virtio/uapi';
import { FileMemory } from './file-memory.ts';
import { ForeignGuest, serveForeignGuest } from './foreign-guest.ts';

// Holes of a file in memory cost nothing to read.
const folder = mkdtempSync(join(existsSync('/dev/shm') ? '/dev/shm' : tmpdir(), 'ebb-foreign-'));
afterAll(() => rmSync(folder, { recursive: true }));

/** As it was when the scripts were recorded: 1 GiB of RAM, and a region of 512 MiB above. */
const RECORDED = {
  regionAddr: 1024 * MiB,
  regionBytes: 512 * MiB,
  balloonFeatures: [VIRTIO_BALLOON_F_STATS_VQ, VIRTIO_BALLOON_F_REPORTING],
};

/** A sparse file of `bytes`. */
function ramFile(name: string, bytes: number): string {
  const path = join(folder, name);
  writeFileSync(path, '');
  truncateSync(path, bytes);
  return path;
}

class Replay {
  readonly guest: ForeignGuest;
  readonly #fd: number;
  #told: string[] = [];

  constructor(name: string) {
    const ram = ramFile(name, 1536 * MiB);
    this.#fd = openSync(ram, 'r+');
    this.guest = new ForeignGuest({ ram, ...RECORDED }, (line) => this.#told.push(line));
  }

  /** What the devices did otherwise than recorded, and how many lines were compared. */
  play(script: string): { wrong: string[]; compared: number } {
    const wrong: string[] = [];
    let compared = 0;
    const expectLine = (line: string, got: string, want: string): void => {
      compared++;
      if (got !== want) wrong.push(`${line}: ${got}`);
    };
    for (const line of script.trim().split('\n')) {
      const [word, address, bytes] = line.split(' ');
      if (word === '#') continue;
      if (word === 'M') writeSync(this.#fd, Buffer.from(bytes, 'hex'), 0, bytes.length / 2, Number(address));
      else if (word === 'A') {
        const got = Buffer.alloc(bytes.length / 2);
        readSync(this.#fd, got, 0, got.length, Number(address));
        expectLine(line, got.toString('hex'), bytes);
      } else if (word === '!') expectLine(line, this.#told.shift() ?? 'not told', line);
      else {
        for (const told of this.#told) wrong.push(`before ${line}: ${told}`);
        const [command, want = 'ok'] = line.split(' = ');
        this.#told = [];
        expectLine(line, this.guest.line(command), want);
        this.#told = this.#told.filter((told) => told.startsWith('!'));
      }
    }
    return { wrong, compared };
  }
}

const script = (name: string): string =>
  readFileSync(new URL(`../../captures/linux/${name}.script`, import.meta.url), 'utf8');

describe.each(['6.1', '6.12', '7.2'])('Linux %s', (version) => {
  test('brings the memory device up, plugs 256 MiB, gives half back, then all, and lets go', () => {
    const replay = new Replay(`mem-${version}`);
    const { wrong, compared } = replay.play(script(`memory-device-${version}`));
    expect([wrong, compared > 140]).toEqual([[], true]);
    const { counters, pluggedBytes } = replay.guest.device;
    // One PLUG per memory block of 128 MiB; each goes in one request again.
    expect([pluggedBytes, counters.plugRequests, counters.unplugRequests, counters.errors]).toEqual([
      0, 2, 2, 0,
    ]);
  });

  test('brings the balloon up, reports, inflates and deflates, tells statistics, and lets go', () => {
    const replay = new Replay(`balloon-${version}`);
    const { wrong, compared } = replay.play(script(`balloon-${version}`));
    expect([wrong, compared > 400]).toEqual([[], true]);
    const { counters } = replay.guest.balloon;
    expect([counters.inflatedPages, counters.badPfns]).toEqual([2048 + 1024, 0]);
    expect(counters.reportedPages).toBeGreaterThan(300_000);
  });
});

test('balloon pages that lie in plugged memory are ballooned: Linux takes movable pages first', () => {
  const { guest } = new Replay('movable');
  expect(guest.balloon.ballooned.length).toBe((1536 * MiB) / PAGE_SIZE);
});

test('a machine reset takes what is plugged and forgets the rings', () => {
  const replay = new Replay('reset');
  const lines = script('memory-device-6.12').split('\n');
  replay.play(lines.slice(0, lines.indexOf('# mem: to 128 MiB')).join('\n'));
  expect(JSON.parse(replay.guest.line('figures'))).toMatchObject({
    requestedBytes: 256 * MiB,
    pluggedBytes: 256 * MiB,
  });
  expect(replay.guest.line('reset')).toBe('ok');
  expect(JSON.parse(replay.guest.line('figures'))).toMatchObject({ pluggedBytes: 0, balloonPages: 0 });
  expect(replay.guest.line('R 0 0x070 4')).toBe('0x0');
  expect(replay.guest.line('stats')).toBe('error');
});

test('an interrupt line is told when it rises and when it falls', () => {
  const told: string[] = [];
  const options = { ram: ramFile('lines', 16 * MiB), regionAddr: 8 * MiB, regionBytes: 8 * MiB };
  const guest = new ForeignGuest(options, (line) => told.push(line));
  const features = ['W 0 0x024 4 1', 'W 0 0x020 4 1'];
  for (const status of [0x1, 0x3, 0xb, 0xf]) {
    if (status === 0xb) for (const line of features) guest.line(line);
    guest.line(`W 0 0x070 4 ${status}`);
  }
  expect(guest.line(`S 0 ${4 * MiB}`)).toBe('ok');
  expect(told).toEqual(['! 0']);
  guest.line('W 0 0x064 4 0x2');
  expect(told).toEqual(['! 0', '~ 0']);
});

test('lines over a socket are answered; nonsense is too, and harms nobody', async () => {
  const path = join(folder, 'bridge');
  const options = { ram: ramFile('socket', 16 * MiB), regionAddr: 8 * MiB, regionBytes: 8 * MiB };
  const server = serveForeignGuest(options, path);
  const socket = connect(path);
  const lines = createInterface({ input: socket })[Symbol.asyncIterator]();
  const ask = async (line: string): Promise<string> => {
    socket.write(`${line}\n`);
    return (await lines.next()).value ?? '';
  };
  expect(await ask('R 1 0x008 4')).toBe('0x5');
  expect(await ask('R 0 0x008 4')).toBe('0x18');
  for (const nonsense of ['', 'hello', 'hint', 'R 9 0 4', 'R -1 0 4', 'W 0 x 4 1', 'S 0 12345'])
    expect(await ask(nonsense)).toBe('error');
  expect(await ask('R 0 0x999 4')).toBe('0x0');
  socket.destroy();
  server.close();
});

test('what a device gives back reads as zeros, and is given back to the file system', () => {
  const ram = ramFile('punch', 16 * MiB);
  const memory = new FileMemory(openSync(ram, 'r+'));
  const fill = (page: number): void => {
    memory.window(page * PAGE_SIZE, PAGE_SIZE, true);
    memory.u8.fill(0x77);
    memory.flush();
  };
  for (let page = 512; page < 1024; page++) fill(page);
  const before = statSync(ram).blocks;
  memory.zero(512, 512);
  memory.window(700 * PAGE_SIZE, 4, false);
  expect(memory.i32[memory.at >> 2]).toBe(0);
  // Where there is no way to punch a hole, zeros have been written.
  expect(statSync(ram).blocks).toBeLessThanOrEqual(before);
  // A hole is not filled to be emptied.
  memory.zero(1024, 512);
  expect(statSync(ram).blocks).toBeLessThanOrEqual(before);
  expect(memory.window(16 * MiB - 2, 4, false)).toBe(false);
});
