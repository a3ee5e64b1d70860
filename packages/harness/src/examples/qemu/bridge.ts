/**
 * A stock Linux in a stock QEMU drives our devices, and what it does is recorded: the scripts in `captures/linux` come from
 * here. Nothing of QEMU is changed.
 *
 * - **Registers**: `x-pci-proxy-dev` forwards a PCI function to another process over a socket (QEMU's multi-process protocol,
 *   `include/hw/remote/mpqemu-link.h`); that process is this one. Its BAR holds two windows of virtio-mmio registers. Once
 *   firmware has placed the BAR the function hides itself: Linux finds the windows by `ssdt.asl`.
 * - **RAM** is a file that both map. It ends below the PC's hole at 3 GiB; the kernel is told to leave its upper half alone
 *   (`mem=1G`), where the memory device's region lies.
 * - **Interrupts** are levels of I/O APIC pins, set over QEMU's qtest socket.
 *
 * The guest asks for the host's side by lines on its console: `@host S 0 268435456`, `@mark text`, `@done`. One vCPU only: with
 * more, QEMU's guard against re-entrant device accesses drops some of them.
 *
 *     apt-get install qemu-system-x86 acpica-tools busybox-static; apt-get download linux-image-amd64's package (since 7.2:
 *     linux-binary's and linux-modules') and unpack it with dpkg-deb -x
 *     iasl ssdt.asl; sh make-initrd.sh KERNEL-TREE initrd.gz
 *     node --conditions=ebb-source bridge.ts VMLINUZ initrd.gz ssdt.aml OUT-FOLDER [MORE QEMU OPTIONS...]
 */
import { spawn } from 'node:child_process';
import { appendFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { connect, type Socket } from 'node:net';
import { createInterface } from 'node:readline';
import { VIRTIO_BALLOON_F_REPORTING, VIRTIO_BALLOON_F_STATS_VQ } from '@ebb/virtio/uapi';
import { ForeignGuest } from '../foreign-guest.ts';
import { RingRecorder } from './ring-recorder.ts';

const RAM_BYTES = 2 * 1024 ** 3;
const REGION = { regionAddr: 0x4000_0000, regionBytes: 0x2000_0000 };
const WINDOW = 0x1000;
/** I/O APIC pins of devices 0 and 1, as `ssdt.asl` says. */
const PINS = [20, 21];
const SCRIPTS = ['memory-device', 'balloon'];

/** Commands of the protocol that are answered, and the answer's own number. */
const RET = 1;
const PCI_CFGWRITE = 2;
const PCI_CFGREAD = 3;
const BAR_WRITE = 4;
const BAR_READ = 5;
const DEVICE_RESET = 7;
/** Header: le32 command, 4 bytes unused, le64 bytes that follow. */
const HEADER = 16;

const [kernel, initrd, ssdt, out, ...more] = process.argv.slice(2);
if (out === undefined) {
  process.stderr.write('usage: bridge VMLINUZ INITRD SSDT OUT-FOLDER [MORE QEMU OPTIONS...]\n');
  process.exit(2);
}

const ram = `/dev/shm/ebb-ram-${process.pid}`;
writeFileSync(ram, '');
truncateSync(ram, RAM_BYTES);
for (const name of SCRIPTS) writeFileSync(`${out}/${name}.script`, '');
const record = (device: number, ...lines: readonly string[]): void =>
  lines.forEach((line) => appendFileSync(`${out}/${SCRIPTS[device]}.script`, `${line}\n`));

/** Lines that rose or fell since QEMU was told last. */
const moved: string[] = [];
const guest = new ForeignGuest(
  { ram, ...REGION, balloonFeatures: [VIRTIO_BALLOON_F_STATS_VQ, VIRTIO_BALLOON_F_REPORTING] },
  (line) => {
    moved.push(line);
    if (line.startsWith('!')) record(Number(line.slice(2)), line);
  },
);
const rings = new RingRecorder(ram);

// ── QEMU ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

const qtestPath = `${out}/qtest.sock`;
rmSync(qtestPath, { force: true });
const append = 'console=ttyS0 mem=1G memhp_default_state=online_movable panic=-1';
const options =
  `-nodefaults -no-user-config -display none -no-reboot -serial stdio -smp 1 -m ${RAM_BYTES / 1024 ** 2}M ` +
  `-object memory-backend-file,id=mem,size=${RAM_BYTES},mem-path=${ram},share=on -machine pc,memory-backend=mem ` +
  `-accel tcg -cpu max -device x-pci-proxy-dev,id=p0,fd=3 -acpitable file=${ssdt} ` +
  `-qtest unix:${qtestPath},server=on,wait=off -qtest-log none -kernel ${kernel} -initrd ${initrd}`;
const qemu = spawn('qemu-system-x86_64', [...options.split(' '), '-append', append, ...more], {
  stdio: ['ignore', 'pipe', 'inherit', 'pipe'],
});
for (const signal of ['SIGTERM', 'SIGINT'] as const) process.on(signal, () => void qemu.kill());
qemu.on('exit', (code) => {
  rmSync(ram, { force: true });
  process.exit(code ?? 0);
});

// ── Interrupt lines ──────────────────────────────────────────────────────────────────────────────────────────────────

let qtest: Promise<Socket> | null = null;
const waiting: (() => void)[] = [];

/** The socket is there once QEMU has made its machine. */
function qtestSocket(): Promise<Socket> {
  qtest ??= new Promise((resolve) => {
    const socket = connect(qtestPath, () => resolve(socket));
    createInterface({ input: socket }).on('line', () => waiting.shift()?.());
  });
  return qtest;
}

/** Tells QEMU which lines have moved; over when it knows. */
async function moveLines(): Promise<void> {
  for (let line = moved.shift(); line !== undefined; line = moved.shift()) {
    const pin = PINS[Number(line.slice(2))];
    const socket = await qtestSocket();
    const known = new Promise<void>((resolve) => waiting.push(resolve));
    socket.write(
      `set_irq_in /machine/i440fx/ioapic unnamed-gpio-in ${pin} ${line.startsWith('!') ? 1 : 0}\n`,
    );
    await known;
  }
}

// ── PCI configuration space: a function of no class with one BAR ─────────────────────────────────────────────────────

const config = Buffer.alloc(256);
config.writeUInt16LE(0x1234, 0);
config.writeUInt16LE(0xebb0, 2);
config.writeUInt32LE(0xff00_0000, 8);
let bar = 0;
let isHidden = false;

function configRead(at: number, length: number): number {
  return isHidden ? 2 ** (8 * length) - 1 : config.readUIntLE(at, length);
}

function configWrite(at: number, value: number): void {
  if (at === 0x10) config.writeUInt32LE((value & ~(2 * WINDOW - 1)) >>> 0, 0x10);
  if (at !== 4) return;
  config.writeUInt16LE(value & 0x0107, 4);
  // Memory is decoded: the BAR has its place.
  isHidden = (value & 2) !== 0;
  bar = config.readUInt32LE(0x10);
}

// ── Register accesses ────────────────────────────────────────────────────────────────────────────────────────────────

async function access(write: boolean, address: number, width: number, value: number): Promise<number> {
  const device = Math.floor((address - bar) / WINDOW);
  const offset = (address - bar) % WINDOW;
  const where = `${device} 0x${offset.toString(16).padStart(3, '0')} ${width}`;
  if (!write) {
    const answer = guest.line(`R ${where}`);
    record(device, `R ${where} = ${answer}`);
    return Number(answer);
  }
  const line = `W ${where} 0x${value.toString(16)}`;
  record(device, ...rings.before(device, offset, value), line);
  guest.line(line);
  record(device, ...rings.after(device, offset));
  await moveLines();
  return 0;
}

// ── Messages ─────────────────────────────────────────────────────────────────────────────────────────────────────────

async function message(command: number, data: Buffer, proxy: Socket): Promise<void> {
  let answer = 0;
  if (command === PCI_CFGWRITE) configWrite(data.readUInt32LE(0), data.readUInt32LE(4));
  else if (command === PCI_CFGREAD) answer = configRead(data.readUInt32LE(0), data.readInt32LE(8));
  else if (command === BAR_WRITE || command === BAR_READ) {
    const address = data.readUInt32LE(0) + data.readUInt32LE(4) * 2 ** 32;
    answer = await access(command === BAR_WRITE, address, data.readUInt32LE(16), data.readUInt32LE(8));
  } else if (command === DEVICE_RESET) {
    isHidden = false;
    config.writeUInt16LE(0, 4);
    for (const device of [0, 1]) record(device, 'reset');
    guest.line('reset');
    await moveLines();
  }
  // The layout of RAM and event descriptors: neither is needed, nor answered.
  else return;
  const reply = Buffer.alloc(HEADER + 8);
  reply.writeInt32LE(RET, 0);
  reply.writeUInt32LE(8, 8);
  reply.writeUInt32LE(answer >>> 0, HEADER);
  reply.writeUInt32LE(Math.floor(answer / 2 ** 32), HEADER + 4);
  proxy.write(reply);
}

/** One thing after the other: what QEMU sends and what the guest's console asks. */
let order: Promise<void> = Promise.resolve();

function serve(proxy: Socket): void {
  let pending = Buffer.alloc(0);
  proxy.on('data', (bytes: Buffer) => {
    pending = Buffer.concat([pending, bytes]);
    while (pending.length >= HEADER) {
      const end = HEADER + pending.readUInt32LE(8);
      if (pending.length < end) return;
      const [command, data] = [pending.readInt32LE(0), pending.subarray(HEADER, end)];
      pending = pending.subarray(end);
      order = order.then(() => message(command, data, proxy));
    }
  });
}

function hostAsks(request: string): void {
  order = order.then(async () => {
    record(request.startsWith('S 0') ? 0 : 1, request);
    guest.line(request);
    await moveLines();
  });
}

function readConsole(input: NodeJS.ReadableStream): void {
  createInterface({ input }).on('line', (line) => {
    process.stdout.write(`${line}\n`);
    const [, word, text = ''] = /@(host|mark|done)\s*(.*?)\r?$/.exec(line) ?? [];
    if (word === 'host') hostAsks(text);
    else if (word === 'mark') record(text.startsWith('mem') ? 0 : 1, `# ${text}`);
    else if (word === 'done') setTimeout(() => void qemu.kill(), 500);
  });
}

serve(qemu.stdio[3] as Socket);
if (qemu.stdout !== null) readConsole(qemu.stdout);
