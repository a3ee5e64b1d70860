/** `ebb vm` as a program, over its socket, driven by a QMP client that nobody here wrote. */
import { spawn, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import Qmp from 'qemu-qmp';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { MiB } from '@ebb/machine';

const CLI = fileURLToPath(new URL('../cli.ts', import.meta.url));
const folder = mkdtempSync(join(tmpdir(), 'ebb-qmp-'));
const socket: string = join(folder, 'qmp');
let vm: ChildProcess;
let client: Qmp;
/** Events and answered commands, in the order in which the client saw them. */
const seen: string[] = [];

function execute(command: string, args: object | null = null): Promise<unknown> {
  return new Promise((resolve, reject) => {
    client.execute(command, args, (error, value) => {
      seen.push(command);
      if (error === null) resolve(value);
      else reject(error);
    });
  });
}
const resize = (value: number): Promise<unknown> =>
  execute('qom-set', { path: '/machine/peripheral/vm0', property: 'requested-size', value });

/** Whether it takes connections: a socket's name is there a moment before anybody listens. */
function listening(): Promise<boolean> {
  const probe = connect(socket);
  return new Promise((resolve) => {
    probe.once('error', () => resolve(false));
    probe.once('connect', () => {
      probe.destroy();
      resolve(true);
    });
  });
}

beforeAll(async () => {
  const args = ['-m', '256M,maxmem=4G', '-smp', '2', '-qmp', `unix:${socket}`, '-monitor', 'none'];
  args.push('-object', 'memory-backend-ram,id=mem0,size=1G');
  args.push('-device', 'virtio-mem-pci,id=vm0,memdev=mem0,requested-size=256M');
  args.push('-device', 'virtio-balloon-pci,id=balloon0');
  vm = spawn(process.execPath, ['--conditions=ebb-source', CLI, 'vm', ...args], { stdio: 'ignore' });
  for (let i = 0; i < 300 && !(await listening()); i++) await new Promise((r) => setTimeout(r, 50));
  client = new Qmp();
  for (const name of ['memory_device_size_change', 'reset', 'stop', 'resume', 'shutdown'])
    client.on(name, (event: string) => seen.push(event));
  await new Promise<void>((resolve, reject) => {
    client.connect(socket, (error) => {
      if (error === null) resolve();
      else reject(error);
    });
  });
}, 30_000);

afterAll(() => {
  client.destroy();
  vm.kill();
  rmSync(folder, { recursive: true });
});

test('it reads the greeting, resizes memory, and hears of it', async () => {
  expect(client.version.qemu.major).toBe(7);
  expect(await execute('query-status')).toEqual({ status: 'running', singlestep: false, running: true });
  expect(await resize(512 * MiB)).toEqual({});
  expect(await execute('query-memory-size-summary')).toEqual({
    'base-memory': 256 * MiB,
    'plugged-memory': 512 * MiB,
  });
  await expect(resize(1)).rejects.toThrow("has to be multiples of 'block-size' (0x200000)");
  expect(await execute('balloon', { value: 128 * MiB })).toEqual({});
  expect(await execute('query-balloon')).toEqual({ actual: 128 * MiB });
  expect(seen).toContain('MEMORY_DEVICE_SIZE_CHANGE');
});

test('clients that vanish in the middle leave the VM running, and others served', async () => {
  for (const last of ['', '{"execute": "qmp_capabilities"}{"execute": "query-', 'garbage']) {
    const other = connect(socket);
    const [greeting] = (await once(other, 'data')) as [Buffer];
    expect(String(greeting)).toMatch(/^\{"QMP"/);
    other.write(last);
    other.destroy();
    await once(other, 'close');
  }
  expect(await resize(256 * MiB)).toEqual({});
  expect(await execute('query-memory-size-summary')).toEqual({
    'base-memory': 256 * MiB,
    'plugged-memory': 256 * MiB,
  });
});

test('it resets the system, pauses it, and ends it', async () => {
  expect(await execute('system_reset')).toEqual({});
  expect(await execute('stop')).toEqual({});
  expect(await execute('cont')).toEqual({});
  expect(await execute('quit')).toEqual({});
  const [code] = (await once(vm, 'exit')) as [number];
  expect(code).toBe(0);
  expect(seen).toEqual(expect.arrayContaining(['RESET', 'STOP', 'RESUME', 'SHUTDOWN']));
  expect(seen.slice(-2)).toEqual(['quit', 'SHUTDOWN']);
});
