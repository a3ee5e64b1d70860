/** Options as texts, checked: what is impossible is the user's one line. */
import { formatBytes, MAX_HOST_MEMORY, MiB, parseSize } from '@ebb/machine';
import { UserError } from './trace/trace.ts';

/** A whole number in a range. */
export function wholeNumber(flag: string, text: string, min: number, max: number): number {
  const value = /^\d+$/.test(text) ? Number(text) : Number.NaN;
  if (!(value >= min && value <= max))
    throw new UserError(`${flag} ${text}: give a whole number from ${min} to ${max}`);
  return value;
}

/** A size in bytes, from `512M` and the like. */
export function sizeOption(flag: string, text: string): number {
  const parsed = parseSize(text);
  if (!parsed.ok) throw new UserError(`${flag}: ${parsed.error}`);
  return parsed.value;
}

/** Memory of a simulated host. */
export function hostMemoryOption(flag: string, text: string): number {
  const bytes = sizeOption(flag, text);
  if (bytes < 64 * MiB || bytes > MAX_HOST_MEMORY || bytes % (2 * MiB) !== 0)
    throw new UserError(`${flag} ${text}: give 64M to ${formatBytes(MAX_HOST_MEMORY)} in steps of 2 MiB`);
  return bytes;
}

export function oneOf<T extends string>(flag: string, text: string, allowed: readonly T[]): T {
  if (!(allowed as readonly string[]).includes(text))
    throw new UserError(`${flag} ${text}: give ${allowed.join(' or ')}`);
  return text as T;
}
