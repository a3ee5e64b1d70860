/** Plants each fault in a scratch copy and runs what must catch it; several at once on the cores there are. */
import { createHash } from 'node:crypto';
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { applyPatch, parsePatch } from 'diff';
import { UserError } from '../trace/trace.ts';
import { allowedCores } from '../fuzz/cores.ts';
import { PROPERTIES } from '../fuzz/properties.ts';
import type { Mutant } from './mutant.ts';
import { ROOT, Scratch, sourcesHash } from './scratch.ts';

/** Runs per property in which a fault must be found. */
const RUNS = 3000;
/** Longest search per property, and longest test: a check that does not end has noticed something, too. */
const PROPERTY_MS = 90_000;
const TEST_MS = 60_000;
/** All tests take two minutes on two cores. */
const ALL_TESTS_MS = 300_000;
/** A patch nobody prepared for: every property gets this long. */
const PATCH_MS = 20_000;

export interface MutantResult {
  readonly name: string;
  readonly caught: boolean;
  /** Property or test that caught it. */
  readonly by: string;
  /** What was found, in one line. */
  readonly how: string;
  /** Number of the run that found it; 0 for tests. */
  readonly runs: number;
  readonly seconds: number;
  readonly cached: boolean;
}

type Check = (scratch: Scratch) => Promise<Omit<MutantResult, 'name' | 'seconds' | 'cached'>>;

const MISSED = { caught: false, by: '', how: 'nothing noticed', runs: 0 };

async function byProperties(
  scratch: Scratch,
  names: readonly string[],
  runs: number,
  milliseconds: number,
): ReturnType<Check> {
  const out = await scratch.search(
    [
      '--conditions=ebb-source',
      'packages/harness/src/cli.ts',
      'fuzz',
      ...names,
      '--workers',
      '1',
      '--shrink',
      '0s',
      ...(runs > 0 ? ['--runs', String(runs)] : []),
      '--time',
      `${milliseconds}ms`,
      '--out',
      join(scratch.folder, 'out'),
      '--json',
      '-',
    ],
    milliseconds + 25_000,
  );
  if (out.stopped) return { caught: true, by: names.join(' '), how: 'the search did not end', runs: 0 };
  if (out.code === 0) return MISSED;
  try {
    const json = JSON.parse(out.output.slice(out.output.indexOf('{\n  "schema"'))) as {
      found: { property: string; run: number; found: string[] }[];
    };
    const [first] = json.found;
    return { caught: true, by: first.property, how: first.found[0], runs: first.run };
  } catch {
    return { caught: out.code !== 2, by: names.join(' '), how: lastLine(out.output), runs: 0 };
  }
}

const NEVER_ENDED = 'the test did not end';

/** One test file, which ends in seconds: one that does not has noticed something, too. */
async function byTest(scratch: Scratch, file: string): ReturnType<Check> {
  const result = await byTests(scratch, [file], TEST_MS);
  return result === null ? { caught: true, by: file, how: NEVER_ENDED, runs: 0 } : result;
}

/** Tests that the filters name, all without one; null if they did not end in time. */
async function byTests(
  scratch: Scratch,
  filters: readonly string[],
  milliseconds: number,
): Promise<Awaited<ReturnType<Check>> | null> {
  const out = await scratch.run(
    ['node_modules/vitest/vitest.mjs', 'run', ...filters, '--bail', '1', '--reporter', 'dot'],
    milliseconds,
  );
  if (out.stopped) return null;
  if (out.code === 0) return MISSED;
  const text = stripColour(out.output);
  const failed = /FAIL\s+(.*)/.exec(text)?.[1] ?? lastLine(out.output);
  // A filter that finds no test is not a catcher.
  const caught = !text.includes('No test files found');
  return { caught, by: filters.join(' ') || 'the tests', how: failed.trim(), runs: 0 };
}

function stripColour(text: string): string {
  // oxlint-disable-next-line no-control-regex
  return text.replaceAll(/\u001b\[[0-9;]*m/g, '');
}
function lastLine(text: string): string {
  return stripColour(text).trim().split('\n').at(-1)?.slice(0, 200) ?? '';
}

/** Plants `mutant` and runs its check. A fault whose text is gone fails. */
async function tryMutant(scratch: Scratch, mutant: Mutant): ReturnType<Check> {
  const text = scratch.read(mutant.file);
  const times = text.split(mutant.find).length - 1;
  if (times !== 1) return { ...MISSED, how: `its text is in ${mutant.file} ${times} times, not once` };
  scratch.write(
    mutant.file,
    text.replace(mutant.find, () => mutant.replace),
  );
  try {
    if ('properties' in mutant.by)
      return await byProperties(scratch, mutant.by.properties, RUNS, PROPERTY_MS);
    const found = await byTest(scratch, mutant.by.test);
    // A test names what it notices. A file that only fails to load may do so without the fault as well.
    if (!found.caught || found.how.includes(' > ') || found.how === NEVER_ENDED) return found;
    scratch.write(mutant.file, text);
    const without = await byTest(scratch, mutant.by.test);
    return without.caught ? { ...MISSED, how: `fails without the fault as well: ${without.how}` } : found;
  } finally {
    scratch.write(mutant.file, text);
  }
}

/** Tries a unified diff: the tests of the packages it touches, then every property, then all tests. */
async function tryPatch(scratch: Scratch, path: string): ReturnType<Check> {
  const before = new Map<string, string>();
  const touched = new Set<string>();
  for (const file of parsePatch(readFileSync(path, 'utf8')).filter((f) => f.hunks.length > 0)) {
    const name = (file.newFileName ?? file.oldFileName ?? '').replace(/^[ab]\//, '');
    if (!scratch.exists(name)) throw new UserError(`${path}: ${name} is not a file of the sources`);
    const text = before.get(name) ?? scratch.read(name);
    const next = applyPatch(scratch.read(name), file, { fuzzFactor: 2 });
    if (next === false) throw new UserError(`${path}: does not apply to ${name}`);
    before.set(name, text);
    scratch.write(name, next);
    const [, folder] = /^packages\/([^/]+)\//.exec(name) ?? [];
    if (folder !== undefined) touched.add(folder);
  }
  if (before.size === 0) throw new UserError(`${path}: not a unified diff`);
  try {
    const folders = [...touched].map((folder) => `packages/${folder}/`);
    const near = await byTests(scratch, folders, ALL_TESTS_MS);
    if (near?.caught === true) return near;
    const names = PROPERTIES.map((p) => p.name);
    const searched = await byProperties(scratch, names, 0, PATCH_MS * names.length);
    if (searched.caught) return searched;
    // On a machine that is busy, tests that do not end have told nothing.
    return (
      (await byTests(scratch, [], ALL_TESTS_MS)) ?? {
        ...MISSED,
        how: 'no verdict: the tests did not end in time',
      }
    );
  } finally {
    for (const [name, text] of before) scratch.write(name, text);
  }
}

// ── Cache ────────────────────────────────────────────────────────────────────────────────────────────────────────

const CACHE = join(ROOT, 'node_modules/.cache/ebb-mutants.json');

function readCache(): Record<string, MutantResult> {
  try {
    return JSON.parse(readFileSync(CACHE, 'utf8')) as Record<string, MutantResult>;
  } catch {
    return {};
  }
}

function cacheKey(sources: string, what: string): string {
  return createHash('sha256').update(sources).update(what).digest('hex');
}

/** Runs the faults and patches; `onResult` hears of each as it comes. */
export async function runMutants(
  mutants: readonly Mutant[],
  patches: readonly string[],
  onResult: (result: MutantResult, done: number, total: number) => void,
): Promise<MutantResult[]> {
  const sources = sourcesHash();
  const cache = readCache();
  const queue: { name: string; key: string; check: Check }[] = [
    ...mutants.map((m) => ({
      name: m.name,
      key: cacheKey(sources, JSON.stringify(m)),
      check: (s: Scratch) => tryMutant(s, m),
    })),
    ...patches.map((p) => ({
      name: p,
      key: cacheKey(sources, readFileSync(p, 'utf8')),
      check: (s: Scratch) => tryPatch(s, p),
    })),
  ];
  const total = queue.length;
  const results: MutantResult[] = [];
  const settle = (result: MutantResult): void => {
    results.push(result);
    onResult(result, results.length, total);
  };
  const waiting = queue.filter(({ key, name }) => {
    const have = cache[key];
    if (have === undefined) return true;
    settle({ ...have, name, cached: true });
    return false;
  });
  const cores = allowedCores();
  const scratches = new Set<Scratch>();
  // An interrupt leaves nothing running and no copies behind.
  const interrupted = (_signal: string, code: number): void => {
    for (const scratch of scratches) scratch.remove();
    process.exit(128 + code);
  };
  process.on('SIGINT', interrupted).on('SIGTERM', interrupted);
  const worker = async (_: unknown, number: number): Promise<void> => {
    const scratch = new Scratch(cores[number % cores.length]);
    scratches.add(scratch);
    try {
      for (let next = waiting.shift(); next !== undefined; next = waiting.shift()) {
        const began = performance.now();
        const outcome = await next.check(scratch);
        const result = {
          name: next.name,
          ...outcome,
          seconds: (performance.now() - began) / 1000,
          cached: false,
        };
        cache[next.key] = result;
        settle(result);
      }
    } finally {
      scratches.delete(scratch);
      scratch.remove();
    }
  };
  await Promise.all(Array.from({ length: Math.min(availableParallelism(), waiting.length) }, worker));
  process.off('SIGINT', interrupted).off('SIGTERM', interrupted);
  mkdirSync(join(ROOT, 'node_modules/.cache'), { recursive: true });
  writeFileSync(CACHE, JSON.stringify(cache));
  return results;
}
