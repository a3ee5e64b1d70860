/** The `ebb` command. Exit codes: 0 fine; 1 a check failed; 2 the user's mistake; 3 a worker died or an internal error. */
import { Command, CommanderError } from 'commander';
import { addCompareCommand } from './compare/commands.ts';
import { addFuzzCommands } from './fuzz/commands.ts';
import { addLitmusCommand } from './litmus/commands.ts';
import { addFidelityCommand } from './memory-device/commands.ts';
import { addMutantCommand } from './mutants/commands.ts';
import { addCheckCommand } from './protocol/commands.ts';
import { inlineFor } from './run/engine.ts';
import { WorkerDied } from './run/worker-endpoint.ts';
import { addScenarioCommands } from './scenarios/commands.ts';
import { addTraceCommands } from './trace/commands.ts';
import { UserError } from './trace/trace.ts';
import { EBB_VERSION } from './version.ts';
import { addVmCommand } from './vm/commands.ts';

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

/** Their executions are short. */
const SEARCHES = new Set(['fuzz', 'replay', 'mutants', 'litmus']);
program.hook('preAction', (_program, command) => {
  if (!SEARCHES.has(command.name())) inlineFor('long');
});

addCompareCommand(program);
addScenarioCommands(program);
addTraceCommands(program);
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

// A reader that has seen enough (`| head`) is no error: what was asked for is still done, and says how it ended.
for (const stream of [process.stdout, process.stderr]) {
  stream.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code === 'EPIPE') return;
    process.stderr.write(`ebb: what it has to say cannot be written: ${error.message}\n`);
    process.exit(2);
  });
}
// The launcher is gone: nobody waits for us.
if (process.channel !== undefined) {
  process.once('disconnect', () => process.exit(3));
  process.channel.unref();
}
try {
  await program.parseAsync(process.argv);
} catch (error) {
  process.exitCode = fail(error);
}
