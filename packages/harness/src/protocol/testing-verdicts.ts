/** What the protocol check says of a few events, for tests. Not exported. */
import { checkTrace } from './check-trace.ts';
import type { DeviceEvent } from './device-events.ts';

function breachesOf(events: readonly DeviceEvent[]): ReturnType<typeof checkTrace>['breaches'] {
  const lines = events.map((event, i) => ({ line: i + 1, event }));
  return checkTrace({ format: 'jsonl', skipped: 0, events: lines }).breaches;
}

/** Each breach as `line who section`. */
export const judge = (...events: DeviceEvent[]): string[] =>
  breachesOf(events).map((b) => `${b.line} ${b.who} ${b.section}`);
/** The requirement that each breaks. */
export const judgeRules = (...events: DeviceEvent[]): string[] => breachesOf(events).map((b) => b.must);
/** Each breach as `line who section: what`. */
export const tell = (...events: DeviceEvent[]): string[] =>
  breachesOf(events).map((b) => `${b.line} ${b.who} ${b.section}: ${b.what}`);
