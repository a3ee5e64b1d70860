/** The harness as a library: runs, traces, scenarios. The command is `cli.ts`. */
export { compare, type CompareOutcome } from './compare/compare.ts';
export { checkCompare, loadTrace } from './compare/options.ts';
export { compareSchema, type CompareJson } from './compare/schema.ts';
export { fidelity } from './fidelity.ts';
export { runInline } from './run/inline-run.ts';
export { runThreads, ThreadPool } from './run/threads-run.ts';
export type { RunSpec, VmSpec } from './run/spec.ts';
export type { Scenario } from './scenarios/scenario.ts';
export { SCENARIOS } from './scenarios/scenarios.ts';
export { runScenario } from './scenarios/run-scenario.ts';
export { readCapture } from './trace/capture.ts';
export { readTrace, writeTrace } from './trace/ebbtrace.ts';
export type { Trace } from './trace/trace.ts';
