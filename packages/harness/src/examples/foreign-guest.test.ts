/**
 * A guest that is not ours: its RAM is a file, its register accesses are lines on a socket. The script is a Linux 6.12
 * bring-up of the memory device in the order in which its driver was observed to access registers.
 */
import { mkdtempSync, openSync, rmSync, writeFileSync } from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { afterAll, expect, test } from 'vitest';
import { MiB, PAGE_SIZE } from '@ebb/machine';
import { RawRing } from '@ebb/virtio/testing';
import { VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE } from '@ebb/virtio/uapi';
import { FileMemory } from './file-memory.ts';
import { ForeignGuest, serveForeignGuest } from './foreign-guest.ts';

const folder = mkdtempSync(join(tmpdir(), 'ebb-foreign-'));
const ram = join(folder, 'ram');
const options = { ram, regionAddr: 8 * MiB, regionBytes: 8 * MiB };
writeFileSync(ram, new Uint8Array(16 * MiB));
afterAll(() => rmSync(folder, { recursive: true }));

const RINGS = { desc: 0x10000, driver: 0x11000, device: 0x12000 };

/** Register accesses of the bring-up: what is read must be what a driver expects to find. */
const BRING_UP = `
R 0 0x000 4 = 0x74726976
R 0 0x004 4 = 0x2
R 0 0x008 4 = 0x18
R 0 0x00c 4
W 0 0x070 4 0x0
R 0 0x070 4 = 0x0
W 0 0x070 4 0x1
R 0 0x070 4 = 0x1
W 0 0x070 4 0x3
W 0 0x014 4 0x1
R 0 0x010 4 = 0x1
W 0 0x014 4 0x0
R 0 0x010 4 = 0x30000005
W 0 0x024 4 0x1
W 0 0x020 4 0x1
W 0 0x024 4 0x0
W 0 0x020 4 0x20000001
R 0 0x070 4 = 0x3
W 0 0x070 4 0xb
R 0 0x070 4 = 0xb
W 0 0x030 4 0x0
R 0 0x044 4 = 0x0
R 0 0x034 4 = 0x80
W 0 0x038 4 0x80
W 0 0x080 4 ${RINGS.desc}
W 0 0x084 4 0x0
W 0 0x090 4 ${RINGS.driver}
W 0 0x094 4 0x0
W 0 0x0a0 4 ${RINGS.device}
W 0 0x0a4 4 0x0
W 0 0x044 4 0x1
R 0 0x0fc 4
R 0 0x100 4 = 0x200000
R 0 0x104 4 = 0x0
R 0 0x0fc 4
R 0 0x110 4 = 0x800000
R 0 0x118 4 = 0x800000
R 0 0x128 4 = 0x0
W 0 0x070 4 0xf
`;

function play(guest: ForeignGuest, script: string): void {
  for (const step of script.trim().split('\n')) {
    const [line, want] = step.split(' = ');
    const answer = guest.line(line);
    if (want !== undefined) expect(`${line} = ${answer}`).toBe(step);
  }
}

test('a Linux driver’s bring-up, and a plug: the answer is in the guest’s own RAM, its interrupt was raised', () => {
  const told: string[] = [];
  const guest = new ForeignGuest(options, (line) => told.push(line));
  play(guest, BRING_UP);
  expect(guest.line(`S 0 ${4 * MiB}`)).toBe('ok');
  expect(told).toEqual(['! 0']);
  play(guest, 'R 0 0x060 4 = 0x2\nW 0 0x064 4 0x2\nR 0 0x130 4 = 0x400000\nR 0 0x120 4 = 0x800000');
  // The guest's side of the file: another descriptor of the same RAM.
  const mine = new FileMemory(openSync(ram, 'r+'));
  const ring = new RawRing(mine, 128, RINGS);
  ring.u32(0x20000, 0);
  ring.u32(0x20008, options.regionAddr);
  ring.u16(0x20010, 2);
  ring.desc(0, 0x20000, 24, VIRTQ_DESC_F_NEXT, 1);
  ring.desc(1, 0x21000, 10, VIRTQ_DESC_F_WRITE);
  ring.u16(0x21000, 0xffff);
  ring.avail(0);
  mine.flush();
  told.length = 0;
  expect(guest.line('W 0 0x050 4 0')).toBe('ok');
  expect(told).toEqual(['! 0']);
  expect(ring.readU16(0x21000)).toBe(0);
  expect(guest.device.pluggedBytes).toBe(4 * MiB);
  expect(guest.line('R 0 0x128 4')).toBe('0x400000');
});

test('the same over a socket: lines in, lines out; nonsense is answered and harms nobody', async () => {
  const path = join(folder, 'bridge');
  const server = serveForeignGuest(options, path);
  const socket = connect(path);
  const lines = createInterface({ input: socket })[Symbol.asyncIterator]();
  const ask = async (line: string): Promise<string> => {
    socket.write(`${line}\n`);
    return (await lines.next()).value ?? '';
  };
  expect(await ask('R 1 0x008 4')).toBe('0x5');
  expect(await ask('R 0 0x008 4')).toBe('0x18');
  for (const nonsense of ['', 'hello', 'R 9 0 4', 'W 0 x 4 1', 'S 0 12345'])
    expect(await ask(nonsense)).toBe('error');
  expect(await ask('R 0 0x999 4')).toBe('0x0');
  socket.destroy();
  server.close();
});

test('what a device gives back reads as zeros in the file', () => {
  const memory = new FileMemory(openSync(ram, 'r+'));
  memory.window(5 * PAGE_SIZE, 4, true);
  memory.i32[memory.at >> 2] = 77;
  memory.zero(5, 1);
  memory.window(5 * PAGE_SIZE, 4, false);
  expect(memory.i32[memory.at >> 2]).toBe(0);
  expect(memory.window(16 * MiB - 2, 4, false)).toBe(false);
});
