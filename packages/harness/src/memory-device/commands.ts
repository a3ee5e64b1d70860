/** `ebb fidelity virtio-mem`. */
import Table from 'cli-table3';
import type { Command } from 'commander';
import { provenance } from '../provenance.ts';
import { emitJson, jsonToStdout, progressLine, say } from '../cli-output.ts';
import { UserError } from '../trace/trace.ts';
import { memoryFidelity } from './fidelity.ts';
import { readSession, SHIPPED_SESSIONS, unfollowed } from './session-file.ts';

/** Rows that differ, shown at most. */
const SHOWN = 20;

export function addFidelityCommand(program: Command): void {
  program
    .command('fidelity')
    .description('replay a captured session and compare our requests with the real driver and device')
    .argument('<what>', 'virtio-mem')
    .argument('<capture>', `a CAPTURE.session.json, or a shipped one: ${SHIPPED_SESSIONS.join(', ')}`)
    .option('--all', 'print every aligned request, not only those that differ')
    .option('--json <file>', 'as JSON; - for standard output')
    .addHelpText(
      'after',
      '\nExamples:\n  ebb fidelity virtio-mem A-session\n  ebb fidelity virtio-mem ./mine.session.json --all --json -',
    )
    .action((what: string, path: string, flags: { all?: boolean; json?: string }) => {
      jsonToStdout(flags.json);
      if (what !== 'virtio-mem') throw new UserError(`fidelity ${what}: there is only virtio-mem`);
      const session = readSession(path);
      for (const action of unfollowed(session))
        process.stderr.write(`ebb: ${path}: action '${action}' is not followed\n`);
      const line = progressLine();
      const result = memoryFidelity(session, (text) => line.show(text));
      line.end();
      const table = new Table({
        style: { head: [], border: [] },
        head: ['device', 'requests: Ebb', 'real', 'agree', 'share'],
        colAligns: ['left', 'right', 'right', 'right', 'right'],
      });
      for (const d of result.devices)
        table.push([d.device, d.requests.ebb, d.requests.real, d.agree, d.share.toFixed(3)]);
      say(`${session.capture}: ${result.virtualSeconds.toFixed(0)} virtual seconds`);
      say(table.toString());
      for (const d of result.devices) {
        const rows = d.aligned.filter((a) => flags.all === true || a.ebb !== a.real);
        for (const row of flags.all === true ? rows : rows.slice(0, SHOWN))
          say(`${d.device}  ${(row.ebb || '—').padEnd(32)} ${row.real || '—'}`);
        if (flags.all !== true && rows.length > SHOWN)
          say(`${d.device}  … ${rows.length - SHOWN} more differ`);
      }
      emitJson(flags.json, {
        ...provenance('inline', 'thp', []),
        capture: session.capture,
        requests: {
          ebb: result.devices.reduce((sum, d) => sum + d.requests.ebb, 0),
          real: result.devices.reduce((sum, d) => sum + d.requests.real, 0),
        },
        agree: result.agree,
        share: result.share,
        ledgerViolations: result.ledgerViolations,
        devices: result.devices.map(({ device, requests, agree, share }) => ({
          device,
          requests,
          agree,
          share,
        })),
        differ: result.devices.flatMap((d) =>
          d.aligned.filter((a) => a.ebb !== a.real).map((a) => ({ device: d.device, ...a })),
        ),
      });
      process.exitCode = result.share === 1 && result.ledgerViolations === 0 ? 0 : 1;
    });
}
