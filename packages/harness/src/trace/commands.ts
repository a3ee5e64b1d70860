/** `ebb trace`: import, describe and check allocation traces. */
import { basename } from 'node:path';
import Table from 'cli-table3';
import type { Command } from 'commander';
import { formatBytes } from '@ebb/machine';
import { checkOutputs, emitJson, jsonToStdout, say } from '../cli-output.ts';
import { loadTrace } from '../compare/options.ts';
import { fidelity } from '../fidelity.ts';
import { provenance } from '../provenance.ts';
import { EBB_VERSION } from '../version.ts';
import { readCapture } from './capture.ts';
import { writeTrace } from './ebbtrace.ts';
import { UserError } from './trace.ts';

export function addTraceCommands(program: Command): void {
  const trace = program
    .command('trace')
    .description('import, describe and check allocation traces')
    .addHelpText(
      'after',
      '\nExamples:\n  ebb trace import ./my-capture\n  ebb trace info build\n  ebb trace fidelity hog',
    );

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
      checkOutputs(out);
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
        events: {
          total: events.count,
          alloc: byOp[0],
          free: byOp[1],
          cacheAdd: byOp[2],
          cacheDelete: byOp[3],
        },
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
      const replayed = loadTrace(name);
      const result = fidelity(replayed);
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
      emitJson(flags.json, {
        ...provenance('inline', 'thp', []),
        trace: { name: replayed.name, hash: replayed.hash },
        ...json,
      });
      process.exitCode = result.agrees && result.ledgerViolations === 0 ? 0 : 1;
    });
}
