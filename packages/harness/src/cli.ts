/** The `ebb` command. Exit codes: 0 fine; 1 a check failed; 2 the user's mistake; 3 a worker died or an internal error. */
import { basename } from 'node:path';
import Table from 'cli-table3';
import { Command, CommanderError } from 'commander';
import { COST_TABLE, costTableHash, formatBytes, NS_PER_S } from '@ebb/machine';
import { z } from 'zod';
import { compare, type CompareOutcome, type CompareProgress } from './compare/compare.ts';
import {
  checkCompare,
  loadTrace,
  oneOf,
  SHIPPED_TRACES,
  wholeNumber,
  type CompareFlags,
} from './compare/options.ts';
import { compareSchema } from './compare/schema.ts';
import { emitJson, jsonToStdout, progressLine, say, writeOut } from './cli-output.ts';
import { fidelity } from './fidelity.ts';
import { addFuzzCommands } from './fuzz/commands.ts';
import { PROPERTIES } from './fuzz/properties.ts';
import { EXHIBITS } from './museum/exhibits.ts';
import { runExhibit } from './museum/run-exhibit.ts';
import { addLitmusCommand } from './litmus/commands.ts';
import { addFidelityCommand } from './memory-device/commands.ts';
import { addMutantCommand } from './mutants/commands.ts';
import { addCheckCommand } from './protocol/commands.ts';
import { renderReport } from './report/report.ts';
import { WorkerDied } from './run/worker-endpoint.ts';
import { findScenario, runScenario } from './scenarios/run-scenario.ts';
import { SCENARIOS } from './scenarios/scenarios.ts';
import { readCapture } from './trace/capture.ts';
import { addVmCommand } from './vm/commands.ts';
import { writeTrace } from './trace/ebbtrace.ts';
import { UserError } from './trace/trace.ts';
import { EBB_VERSION } from './version.ts';

const program = new Command();

program
  .name('ebb')
  .description('A laboratory for the memory that moves between virtual machines and their host.')
  .version(EBB_VERSION)
  .showHelpAfterError(false)
  .exitOverride()
  .enablePositionalOptions()
  .configureOutput({ writeErr: (text) => process.stderr.write(text.replace(/^error: /, 'ebb: ')) })
  .addHelpText(
    'after',
    `
Examples:
  ebb compare                              how many VMs fit under none, balloon, reporting
  ebb compare --trace build --json -       another shipped trace, as JSON
  ebb run pressure                         one mechanism, end to end, in real threads
  ebb trace import ./my-capture            a capture of your own
  ebb trace fidelity build                 our end state against the real kernel's
  ebb fuzz --time 60s                      every property, under schedules from a seed
  ebb replay out/fuzz/CASE.json --story -  what happened, step by step

Exit codes: 0 fine, 1 a check failed, 2 your mistake, 3 a worker died or an internal error.`,
  );

// ── compare ──────────────────────────────────────────────────────────────────────────────────────────────────────

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
  .option('--trace-out <prefix>', 'write allocation events (tracefs text) and device events of the last run')
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
    async (flags: CompareFlags & { report?: string; json?: string; schema?: boolean; traceOut?: string }) => {
      if (flags.schema === true) {
        process.stdout.write(`${JSON.stringify(z.toJSONSchema(compareSchema), null, 2)}\n`);
        return;
      }
      jsonToStdout(flags.json);
      const options = checkCompare(flags);
      const line = progressLine();
      const outcome = await compare(
        options,
        (p) => line.show(progressText(p, options.hostMemory)),
        flags.traceOut !== undefined,
      );
      line.end();
      say(compareTable(outcome));
      for (const note of outcome.notes) say(note);
      if (flags.report !== undefined) {
        writeOut(flags.report, renderReport(outcome));
        say(`report: ${flags.report}`);
      }
      if (flags.traceOut !== undefined) writeTraces(flags.traceOut, outcome.allocTrace, outcome.deviceTrace);
      emitJson(flags.json, outcome.json);
      const violated = outcome.json.results.some((r) => r.ledgerViolations > 0);
      const failed =
        options.vms !== undefined && outcome.json.results.some((r) => r.vmsFitRange[0] < (options.vms ?? 0));
      process.exitCode = violated || failed ? 1 : 0;
    },
  );

function writeTraces(prefix: string, alloc: readonly string[], device: readonly string[]): void {
  writeOut(`${prefix}.trace.txt`, `# tracer: nop\n#\n${alloc.join('\n')}\n`);
  writeOut(`${prefix}.qemu-trace.log`, `${device.join('\n')}\n`);
  say(
    `traces: ${prefix}.trace.txt (${alloc.length} events), ${prefix}.qemu-trace.log (${device.length} events)`,
  );
}

function progressText(p: CompareProgress, hostMemory: number): string {
  const phase = p.exact ? `exactly ${p.vms}` : `starting, ${p.vms} up`;
  return `${p.technique}, seed ${p.seed}: ${phase}, ${p.finished} finished, host ${formatBytes(p.hostUsedBytes)} of ${formatBytes(hostMemory)}, ${(p.nowNs / NS_PER_S).toFixed(1)} virtual s`;
}

function compareTable(outcome: CompareOutcome): string {
  const { json } = outcome;
  const table = new Table({
    head: [
      'technique',
      'VMs fit',
      'range',
      'host peak',
      'returned',
      'EPT viol.',
      'flushes',
      'kicks',
      'stall',
      'p99 stall',
      'violations',
      'wall',
    ],
    style: { head: [], border: [] },
    colAligns: ['left', ...new Array<'right'>(11).fill('right')],
  });
  for (const r of json.results) {
    table.push([
      r.technique,
      String(r.vmsFit),
      `${r.vmsFitRange[0]}–${r.vmsFitRange[1]}`,
      formatBytes(r.hostPeakBytes),
      formatBytes(r.returnedBytes),
      String(r.eptViolations),
      String(r.tlbFlushes),
      String(r.kicks),
      `${(r.stallVirtualNs.total / 1e6).toFixed(1)} ms${r.lowerBounds.includes('stallVirtualNs') ? ' ≥' : ''}`,
      `${(r.stallVirtualNs.p99 / 1e3).toFixed(0)} µs`,
      String(r.ledgerViolations),
      `${(r.wallMs / 1000).toFixed(1)} s`,
    ]);
  }
  const head = `${json.trace.name}: guests of ${formatBytes(json.trace.guestMemoryBytes)} on a host of ${formatBytes(json.host.memoryBytes)}, ${json.seeds.length} seed(s), ${json.schedule}`;
  return `${head}\n${table.toString()}`;
}

// ── run, list ────────────────────────────────────────────────────────────────────────────────────────────────────

program
  .command('run')
  .description('run a scenario and evaluate its checks')
  .argument('<scenario>', `one of ${[...SCENARIOS, ...EXHIBITS].map((s) => s.name).join(', ')}`)
  .option('--schedule <kind>', 'threads or inline', 'threads')
  .option('--seed <n>', 'seed of the scenario', '1')
  .option('--profile <kind>', 'of an exhibit of the museum: broken, fixed or both', 'both')
  .option(
    '--trace-out <prefix>',
    'write allocation events (tracefs text) and device events (QEMU trace lines)',
  )
  .option('--json <file>', 'write the result as JSON; - for standard output')
  .addHelpText(
    'after',
    '\nExamples:\n  ebb run pressure\n  ebb run reporting --schedule inline --trace-out out/reporting\n  ebb run balloon --json -\n  ebb run firecracker-6167 --profile broken',
  )
  .action(
    async (
      name: string,
      flags: { schedule: string; seed: string; profile: string; traceOut?: string; json?: string },
    ) => {
      jsonToStdout(flags.json);
      const exhibit = EXHIBITS.find((e) => e.name === name);
      if (exhibit !== undefined) {
        runExhibit(exhibit, flags.profile, flags.json);
        return;
      }
      const scenario = findScenario(name);
      const schedule = oneOf('--schedule', flags.schedule, ['threads', 'inline'] as const);
      const seed = wholeNumber('--seed', flags.seed, 0, 2 ** 31 - 1);
      const line = progressLine();
      const run = await runScenario(
        scenario,
        { schedule, seed, traceOut: flags.traceOut !== undefined },
        (p) =>
          line.show(
            `${name}: ${(p.nowNs / NS_PER_S).toFixed(2)} virtual s, host ${formatBytes(p.hostUsedBytes)}`,
          ),
      );
      line.end();
      say(`${scenario.name}: ${scenario.about}`);
      const table = new Table({ style: { head: [], border: [] }, head: ['', 'check', 'value'] });
      for (const check of run.checks) table.push([check.ok ? 'ok' : 'FAIL', check.what, String(check.value)]);
      say(table.toString());
      for (const violation of run.outcome.result.violations.slice(0, 8)) say(violation);
      say(`${run.passed ? 'passed' : 'failed'} in ${(run.wallMs / 1000).toFixed(1)} s`);
      if (flags.traceOut !== undefined)
        writeTraces(flags.traceOut, run.allocTrace, run.outcome.result.deviceTrace);
      const { samples, deviceTrace: _deviceTrace, ...figures } = run.outcome.result;
      emitJson(flags.json, {
        schema: 1,
        ebb: EBB_VERSION,
        scenario: name,
        schedule,
        seeds: [seed],
        costTable: costTableHash(COST_TABLE),
        backing: scenario.spec(seed).backing,
        passed: run.passed,
        checks: run.checks,
        samples: samples.length,
        ...figures,
      });
      process.exitCode = run.passed ? 0 : 1;
    },
  );

program
  .command('list')
  .description('list scenarios, museum, properties and shipped traces')
  .option('--json <file>', 'as JSON; - for standard output')
  .addHelpText('after', '\nExamples:\n  ebb list\n  ebb list --json -')
  .action((flags: { json?: string }) => {
    jsonToStdout(flags.json);
    const table = new Table({
      style: { head: [], border: [] },
      head: ['scenario', 'shows', 'rows'],
      colWidths: [28, 84, 24],
      wordWrap: true,
    });
    for (const s of SCENARIOS) table.push([s.name, s.about, s.rows]);
    for (const e of EXHIBITS) table.push([e.name, `museum: ${e.about}`, e.rows]);
    for (const p of PROPERTIES) table.push([p.name, `property of \`ebb fuzz\`: ${p.about}`, p.rows]);
    say(table.toString());
    say(`shipped traces: ${SHIPPED_TRACES.join(', ')}`);
    emitJson(flags.json, {
      schema: 1,
      ebb: EBB_VERSION,
      scenarios: SCENARIOS.map(({ name, about, rows }) => ({ name, about, rows })),
      museum: EXHIBITS.map(({ name, about, rows }) => ({ name, about, rows })),
      properties: PROPERTIES.map(({ name, about, rows }) => ({ name, about, rows })),
      traces: SHIPPED_TRACES,
    });
  });

// ── trace ────────────────────────────────────────────────────────────────────────────────────────────────────────

const trace = program.command('trace').description('import, describe and check allocation traces');

trace
  .command('import')
  .description('read tracefs text or a capture folder into an .ebbtrace file')
  .argument(
    '<path>',
    'tracefs text (may be gzipped) or a folder with trace.txt and, if present, start.* and end.*',
  )
  .option('-o, --output <file>', 'where to write (default: NAME.ebbtrace)')
  .option('--json <file>', 'as JSON; - for standard output')
  .addHelpText(
    'after',
    '\nExamples:\n  ebb trace import ./capture\n  ebb trace import trace.txt.gz -o mine.ebbtrace',
  )
  .action((path: string, flags: { output?: string; json?: string }) => {
    jsonToStdout(flags.json);
    const imported = readCapture(path);
    const out = flags.output ?? `${imported.name}.ebbtrace`;
    let bytes = 0;
    try {
      bytes = writeTrace(out, imported);
    } catch (error) {
      throw new UserError(`${out}: cannot be written: ${(error as Error).message.split('\n')[0]}`);
    }
    const state =
      imported.start === undefined
        ? 'no start state: the guest will start freshly booted'
        : 'with its start state';
    say(`${basename(out)}: ${imported.events.count} events, ${formatBytes(bytes)}, ${state}`);
    for (const [why, n] of Object.entries(imported.skipped)) say(`skipped ${n} × ${why}`);
    emitJson(flags.json, {
      schema: 1,
      ebb: EBB_VERSION,
      file: out,
      name: imported.name,
      hash: imported.hash,
      events: imported.events.count,
      bytes,
      skipped: imported.skipped,
    });
  });

trace
  .command('info')
  .description('describe a trace')
  .argument('<trace>', 'shipped name, .ebbtrace file, tracefs text or capture folder')
  .option('--json <file>', 'as JSON; - for standard output')
  .addHelpText('after', '\nExamples:\n  ebb trace info build\n  ebb trace info ./capture --json -')
  .action((name: string, flags: { json?: string }) => {
    jsonToStdout(flags.json);
    const t = loadTrace(name);
    const { events } = t;
    const byOp = [0, 0, 0, 0];
    for (const op of events.op) byOp[op]++;
    const seconds = events.count === 0 ? 0 : (events.timeUs[events.count - 1] - events.timeUs[0]) / 1e6;
    const info = {
      schema: 1,
      ebb: EBB_VERSION,
      name: t.name,
      hash: t.hash,
      cpus: t.nrCpus,
      guestMemoryBytes: t.guestMemoryBytes,
      maxPfn: t.maxPfn,
      seconds,
      events: { total: events.count, alloc: byOp[0], free: byOp[1], cacheAdd: byOp[2], cacheDelete: byOp[3] },
      startState: t.start !== undefined,
      endState: t.end !== undefined,
      skipped: t.skipped,
      marks: t.marks.map((m) => m.name),
    };
    say(
      `${info.name} (hash ${info.hash}): ${info.cpus} CPUs, ${formatBytes(info.guestMemoryBytes)}, ${seconds.toFixed(1)} s`,
    );
    say(
      `${events.count} events: ${byOp[0]} alloc, ${byOp[1]} free, ${byOp[2]} page-cache add, ${byOp[3]} page-cache delete`,
    );
    say(
      `start state: ${info.startState ? 'yes' : 'no'}, end state: ${info.endState ? 'yes' : 'no'}; marks: ${info.marks.join(' ')}`,
    );
    emitJson(flags.json, info);
  });

trace
  .command('fidelity')
  .description("replay a capture and compare our end state with the real kernel's")
  .argument('<trace>', 'a trace with start and end states')
  .option('--json <file>', 'as JSON; - for standard output')
  .addHelpText('after', '\nExamples:\n  ebb trace fidelity build\n  ebb trace fidelity ./capture --json -')
  .action((name: string, flags: { json?: string }) => {
    jsonToStdout(flags.json);
    const result = fidelity(loadTrace(name));
    const { json } = result;
    const table = new Table({ style: { head: [], border: [] }, head: ['', 'Ebb', 'Linux', 'difference'] });
    const row = (what: string, ebb: number, real: number): void => {
      table.push([
        what,
        String(Math.round(ebb * 1000) / 1000),
        String(Math.round(real * 1000) / 1000),
        real === 0 ? '' : `${(((ebb - real) / real) * 100).toFixed(2)} %`,
      ]);
    };
    row('free pages', json.freePages.ebb, json.freePages.real);
    row('per-CPU pages', json.pcpPages.ebb, json.pcpPages.real);
    row('free + per-CPU', json.freePages.ebb + json.pcpPages.ebb, json.freePages.real + json.pcpPages.real);
    row('page cache', json.pageCachePages.ebb, json.pageCachePages.real);
    row('large free share', json.largeFreeShare.ebb, json.largeFreeShare.real);
    say(table.toString());
    for (const [why, n] of Object.entries(result.dropped)) say(`not applied: ${n} × ${why}`);
    say(result.agrees ? 'agrees (1 %, 1 %, 0.05)' : 'DIFFERS by more than 1 %, 1 %, 0.05');
    emitJson(flags.json, json);
    process.exitCode = result.agrees && result.ledgerViolations === 0 ? 0 : 1;
  });

addVmCommand(program);
addFidelityCommand(program);
addFuzzCommands(program);
addMutantCommand(program);
addCheckCommand(program);
addLitmusCommand(program);

/** Maps what went wrong to an exit code and one line. */
function fail(error: unknown): number {
  if (error instanceof CommanderError) return error.exitCode === 0 ? 0 : 2;
  if (error instanceof UserError) {
    process.stderr.write(`ebb: ${error.message}\n`);
    return 2;
  }
  if (error instanceof WorkerDied) {
    process.stderr.write(`ebb: ${error.message}\n`);
    return 3;
  }
  const e = error instanceof Error ? error : new Error(String(error));
  process.stderr.write(`ebb: internal error: ${e.message}\n${e.stack ?? ''}\n`);
  return 3;
}

// A reader that has seen enough (`| head`) is no error.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code === 'EPIPE') process.exit(0);
  throw error;
});
try {
  await program.parseAsync(process.argv);
} catch (error) {
  process.exitCode = fail(error);
}
