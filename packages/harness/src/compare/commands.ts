/** `ebb compare`: how many VMs fit, per technique. */
import Table from 'cli-table3';
import type { Command } from 'commander';
import { formatBytes, NS_PER_S } from '@ebb/machine';
import { z } from 'zod';
import {
  checkOutputs,
  emitJson,
  jsonToStdout,
  progressLine,
  say,
  writeOut,
  writeTraces,
} from '../cli-output.ts';
import { renderReport } from '../report/report.ts';
import { compare, verdict, type CompareOutcome, type CompareProgress } from './compare.ts';
import { checkCompare, SHIPPED_TRACES, type CompareFlags } from './options.ts';
import { compareSchema } from './schema.ts';

export function addCompareCommand(program: Command): void {
  program
    .command('compare')
    .description('count how many VMs replaying a trace fit on a host, per technique')
    .option(
      '--trace <name>',
      `shipped trace (${SHIPPED_TRACES.join(', ')}), .ebbtrace file, tracefs text or capture folder`,
      'reporting',
    )
    .option(
      '--technique <list>',
      'none, balloon, reporting, virtio-mem; separated by commas',
      'none,balloon,reporting',
    )
    .option('--host-memory <size>', 'memory of the host', '2G')
    .option('--guest-memory <size>', 'memory of each guest (default: of the capture)')
    .option('--vcpus <n>', 'vCPUs per VM (default: CPUs of the capture)')
    .option('--stagger <seconds>', 'virtual seconds between boots', '10')
    .option('--repeat <n>', 'seeds to run; the median counts', '3')
    .option('--vms <n>', 'exactly this many VMs, no search')
    .option('--max-vms <n>', 'stop searching here', '64')
    .option('--backing <kind>', 'thp (2 MiB where possible) or 4k', 'thp')
    .option('--schedule <kind>', 'threads or inline', 'threads')
    .option('--seed <n>', 'first seed', '1')
    .option('--report <file>', 'write a page with plots')
    .option(
      '--trace-out <prefix>',
      'write allocation events (tracefs text) and device events of the last run, of each VM',
    )
    .option('--json <file>', 'write the result as JSON; - for standard output')
    .option('--schema', 'print the JSON schema of the result and exit')
    .addHelpText(
      'after',
      `
Examples:
  ebb compare --report out/compare.html
  ebb compare --trace hog --host-memory 4G --technique none,reporting
  ebb compare --vms 6 --technique reporting --schedule inline --json -`,
    )
    .action(
      async (
        flags: CompareFlags & { report?: string; json?: string; schema?: boolean; traceOut?: string },
      ) => {
        if (flags.schema === true) {
          process.stdout.write(`${JSON.stringify(z.toJSONSchema(compareSchema), null, 2)}\n`);
          return;
        }
        jsonToStdout(flags.json);
        const options = checkCompare(flags);
        checkOutputs(flags.json, flags.report, flags.traceOut);
        const line = progressLine();
        const outcome = await compare(
          options,
          (p) => line.show(progressText(p, options.hostMemory)),
          flags.traceOut !== undefined,
        );
        line.end();
        say(compareTable(outcome));
        const { trace, vcpus } = options;
        if (trace.nrCpus > vcpus)
          say(
            `events of ${trace.nrCpus} CPUs ran on ${vcpus} vCPUs (--vcpus, at most 8): CPU c on vCPU c mod ${vcpus}`,
          );
        for (const note of outcome.notes) say(note);
        if (flags.report !== undefined) {
          writeOut(flags.report, renderReport(outcome));
          say(`report: ${flags.report}`);
        }
        if (flags.traceOut !== undefined)
          writeTraces(flags.traceOut, outcome.allocTrace, outcome.deviceTrace);
        emitJson(flags.json, outcome.json);
        const violated = outcome.json.results.some((r) => r.ledgerViolations > 0);
        const failed =
          options.vms !== undefined &&
          outcome.json.results.some((r) => r.vmsFitRange[0] < (options.vms ?? 0));
        process.exitCode = violated || failed ? 1 : 0;
      },
    );
}

function progressText(p: CompareProgress, hostMemory: number): string {
  const phase = p.exact ? `exactly ${p.vms}` : `starting, ${p.vms} up`;
  return `${p.technique}, seed ${p.seed}: ${phase}, ${p.finished} finished, host ${formatBytes(p.hostUsedBytes)} of ${formatBytes(hostMemory)}, ${(p.nowNs / NS_PER_S).toFixed(1)} virtual s`;
}

function compareTable({ json, vms }: CompareOutcome): string {
  const figures = [
    'host peak',
    'returned',
    'EPT viol.',
    'flushes',
    'kicks',
    'stall',
    'p99 stall',
    'violations',
    'wall',
  ];
  const head = ['technique', ...(vms === undefined ? ['VMs fit', 'range'] : [`${vms} VMs fit`]), ...figures];
  const table = new Table({
    head,
    style: { head: [], border: [] },
    colAligns: ['left', ...new Array<'right'>(head.length - 1).fill('right')],
  });
  for (const r of json.results) {
    const bound = (name: string): string => (r.lowerBounds.includes(name) ? ' ≥' : '');
    table.push([
      r.technique,
      ...(vms === undefined ? [String(r.vmsFit), r.vmsFitRange.join('–')] : [verdict(r.vmsFitRange)]),
      formatBytes(r.hostPeakBytes) + bound('hostPeakBytes'),
      formatBytes(r.returnedBytes) + bound('returnedBytes'),
      String(r.eptViolations) + bound('eptViolations'),
      String(r.tlbFlushes) + bound('tlbFlushes'),
      String(r.kicks) + bound('kicks'),
      `${(r.stallVirtualNs.total / 1e6).toFixed(1)} ms${bound('stallVirtualNs')}`,
      `${(r.stallVirtualNs.p99 / 1e3).toFixed(0)} µs`,
      String(r.ledgerViolations),
      `${(r.wallMs / 1000).toFixed(1)} s`,
    ]);
  }
  const title = `${json.trace.name}: guests of ${formatBytes(json.trace.guestMemoryBytes)} on a host of ${formatBytes(json.host.memoryBytes)}, ${json.seeds.length} seed(s), ${json.schedule}`;
  return `${title}\n${table.toString()}`;
}
