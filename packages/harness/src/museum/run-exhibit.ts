/** Runs an exhibit of the museum: `ebb run NAME`. */
import Table from 'cli-table3';
import { emitJson, say } from '../cli-output.ts';
import { provenance } from '../provenance.ts';
import type { Exhibit } from './exhibits.ts';

/** Shows the broken profile, the fixed one, or both; exit code 1 if one is not as it must be. */
export function runExhibit(
  exhibit: Exhibit,
  which: 'both' | 'broken' | 'fixed',
  json: string | undefined,
): void {
  const profiles = which === 'both' ? (['broken', 'fixed'] as const) : ([which] as const);
  say(`${exhibit.name}: ${exhibit.about}`);
  const table = new Table({ style: { head: [], border: [] }, head: ['', 'profile', 'check', 'value'] });
  const shown = profiles.map((name) => ({ profile: name, checks: exhibit.show(name === 'broken') }));
  for (const { profile: name, checks } of shown)
    for (const c of checks) table.push([c.ok ? 'ok' : 'FAIL', name, c.what, String(c.value)]);
  say(table.toString());
  const passed = shown.every(({ checks }) => checks.every((c) => c.ok));
  emitJson(json, { ...provenance('inline', '4k', []), scenario: exhibit.name, museum: true, passed, shown });
  process.exitCode = passed ? 0 : 1;
}
