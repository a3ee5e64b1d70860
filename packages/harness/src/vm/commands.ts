/** `ebb vm`: a VM described by QEMU's command line, under its monitors. */
import { availableParallelism } from 'node:os';
import type { Command } from 'commander';
import { formatBytes, MiB, PAGE_SIZE, parseSize, RC_DOORBELL, RC_STOP, RC_WINDOW } from '@ebb/machine';
import { hostBuffers, runBuffers } from '../run/buffers.ts';
import type { CpuWorker } from '../run/cpu-worker.ts';
import type { RunSpec } from '../run/spec.ts';
import { spawnWorker } from '../run/worker-endpoint.ts';
import { hostMemoryOption } from '../cli-options.ts';
import { UserError } from '../trace/trace.ts';
import { parseCommandLine, type VmDescription } from './command-line.ts';
import { listen, QmpClients, serveStdio, serveStdioQmp, type MonitorApi } from './monitors.ts';
import type { SessionWorker } from './session-worker.ts';

/** Unmovable memory that the RFC's guest held in its first region: 164 MiB. */
const RFC_HELD = 164 * MiB;
const SUB_BLOCK: number = 2 * MiB;

interface VmFlags {
  hostMemory: string;
  hold?: string;
}

export function addVmCommand(program: Command): void {
  program
    .command('vm')
    .description('start a VM described by a QEMU command line and open its monitor')
    .argument('[options...]', 'QEMU options; those without meaning here are accepted and named')
    .option('--host-memory <size>', 'memory of the host', '4G')
    .option(
      '--hold <id=size>',
      "unmovable memory the guest keeps in a device's first blocks (default: 164M in the first, in the RFC's dialect)",
    )
    .passThroughOptions()
    .allowUnknownOption()
    .addHelpText(
      'after',
      `
The options of \`ebb vm\` come first; the rest is QEMU's:
  -m SIZE,maxmem=SIZE[,slots=N]   -smp N|sockets=S,cores=C   -numa node,nodeid=N,cpus=A-B[,memdev=ID]
  -object memory-backend-ram,id=ID,size=SIZE[,max-size=SIZE]
  -device virtio-mem-pci,id=ID,memdev=ID,node=N[,requested-size=SIZE][,block-size=SIZE][,unplugged-inaccessible=on]
  -device virtio-balloon-pci,id=ID   -device pc-dimm,id=ID,memdev=ID[,node=N]
  -qmp unix:PATH|stdio   -monitor unix:PATH|stdio|none   -chardev socket,id=ID,path=PATH -mon chardev=ID,mode=readline|control
With slots, DIMMs come and go at run time: object_add, device_add pc-dimm, device_del, object_del.
A backend with max-size selects the dialect of the 2017 RFC. The human monitor is on standard input unless QMP or none is.

Examples:
  ebb vm -m 1G,maxmem=4G -object memory-backend-ram,id=mem0,size=2G -device virtio-mem-pci,id=vm0,memdev=mem0
  echo 'info memory-devices' | ebb vm -m 1G,maxmem=4G -object memory-backend-ram,id=mem0,size=2G -device virtio-mem-pci,id=vm0,memdev=mem0,requested-size=1G
  ebb vm -m 1G,maxmem=4G -qmp unix:/tmp/ebb.qmp -object memory-backend-ram,id=mem0,size=2G -device virtio-mem-pci,id=vm0,memdev=mem0`,
    )
    .action(async (args: string[], flags: VmFlags) => {
      await runVm(parseCommandLine(args), flags);
    });
}

async function runVm(description: VmDescription, flags: VmFlags): Promise<void> {
  const hostBytes = hostMemoryOption('--host-memory', flags.hostMemory);
  const held = heldBlocks(description, flags.hold);
  const spec = sessionSpec(description, hostBytes);
  const buffers = runBuffers(spec, hostBuffers(hostBytes));
  const crowded = spec.workers + 1 > availableParallelism();
  if (description.ignored.length > 0)
    process.stderr.write(`ebb: accepted without effect: ${description.ignored.join(', ')}\n`);

  const host = spawnWorker<SessionWorker>('../vm/session-worker', 'host');
  const cpus = Array.from({ length: spec.workers }, (_, i) =>
    spawnWorker<CpuWorker>('./cpu-worker', `cpu${i}`),
  );
  const deaths = Promise.race([host.died, ...cpus.map((cpu) => cpu.died)]);
  const runs = Promise.all([
    host.api.run(description, spec, buffers, crowded),
    ...cpus.map((cpu, i) => cpu.api.run(spec, buffers, i, crowded)),
  ]);
  const stop = (): void => {
    const words = new Int32Array(buffers.runControl);
    Atomics.store(words, RC_STOP, 1);
    Atomics.notify(words, RC_WINDOW);
    Atomics.add(words, RC_DOORBELL, 1);
    Atomics.notify(words, RC_DOORBELL);
  };
  const api = host.api as unknown as MonitorApi;
  const clients = new QmpClients();
  const servers = [];
  let over = false;
  try {
    if (held.length > 0) {
      await Promise.race([host.api.hold(held), deaths]);
      process.stderr.write(
        `ebb: the guest keeps ${formatBytes(held.length * SUB_BLOCK)} of ${description.devices[0].id} in use that cannot move\n`,
      );
    }
    for (const place of description.monitors)
      if (place.socket !== null) servers.push(await listen(place.socket, place.mode, api, clients));
    const events = async (): Promise<void> => {
      for (;;) {
        const text = await host.api.nextEvents();
        if (text === '') return;
        clients.broadcast(text);
      }
    };
    const told = events().catch(() => undefined);
    const ended = runs.then(async ([end]) => {
      await told;
      over = true;
      return end;
    });
    await Promise.race([Promise.race([ended, stdioMonitor(description, api, clients, () => over)]), deaths]);
    // The end of standard input is the end of the session only where nobody else can reach the VM.
    if (!over && servers.length === 0) await Promise.race([api.hmp('quit'), ended]);
    const end = await Promise.race([ended, deaths]);
    if (end.why !== '') process.stderr.write(`ebb: the VM stopped: ${end.why}\n`);
    for (const violation of end.violations) process.stderr.write(`${violation}\n`);
    process.exitCode = end.ledgerViolations > 0 || end.why !== '' ? 1 : 0;
  } finally {
    over = true;
    stop();
    for (const server of servers) server.close();
    process.stdin.destroy();
    await Promise.all([host.close(), ...cpus.map((cpu) => cpu.close())]);
  }
}

/** Serves standard input: the human monitor, QMP if that was asked for, or nothing where both are elsewhere. */
async function stdioMonitor(
  description: VmDescription,
  api: MonitorApi,
  clients: QmpClients,
  isOver: () => boolean,
): Promise<void> {
  const place = description.monitors.find((m) => m.socket === null);
  // Nobody reads it: the VM runs until a monitor on a socket ends it.
  if (description.noStdio && place === undefined) return new Promise(() => undefined);
  if (place?.mode === 'control') await serveStdioQmp(api, clients);
  else await serveStdio(api, isOver);
}

/** First pages of the sub-blocks that the guest keeps in use. */
export function heldBlocks(description: VmDescription, hold: string | undefined): number[] {
  let id = description.devices[0]?.id;
  let bytes = description.dialect === 'rfc-2017' ? RFC_HELD : 0;
  if (hold !== undefined) {
    const [name, text = ''] = hold.split('=');
    const parsed = parseSize(text);
    if (!parsed.ok) throw new UserError(`--hold ${hold}: ${parsed.error}`);
    id = name;
    bytes = parsed.value;
  }
  if (bytes === 0) return [];
  const device = description.devices.find((d) => d.id === id);
  if (device === undefined) throw new UserError(`--hold ${hold ?? ''}: no memory device '${id ?? ''}'`);
  if (bytes % SUB_BLOCK !== 0 || bytes > device.regionBytes)
    throw new UserError(`--hold ${hold ?? ''}: give a multiple of 2M that the region has`);
  if (bytes > device.requestedBytes)
    throw new UserError(
      `--hold ${hold ?? ''}: only ${formatBytes(device.requestedBytes)} are plugged at the start; give requested-size=`,
    );
  return Array.from({ length: bytes / SUB_BLOCK }, (_, i) => (device.addr + i * SUB_BLOCK) / PAGE_SIZE);
}

/** A run that goes on until a monitor ends it. */
export function sessionSpec(description: VmDescription, hostBytes: number): RunSpec {
  return {
    hostFrames: hostBytes / PAGE_SIZE,
    backing: 'thp',
    vms: [description.vm],
    vcpusPerVm: description.vcpus,
    workers: description.vcpus,
    sampleNs: Number.POSITIVE_INFINITY,
    graceNs: Number.POSITIVE_INFINITY,
    traceOut: false,
    poison: 'edges',
  };
}
