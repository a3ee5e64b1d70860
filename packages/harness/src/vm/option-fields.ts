/** Values of QEMU's options: `name=value` lists, sizes and numbers, with a clear word for what is neither. */
import { parseSize } from '@ebb/machine';
import { UserError } from '../trace/trace.ts';

/** What an option says, by name. */
export type Fields = ReadonlyMap<string, string>;

/** `a=b,c=d`; a first word without `=` is the value of `first`. A name without a value is `on`. */
export function fields(text: string, first: string): Fields {
  const map = new Map<string, string>();
  text.split(',').forEach((part, i) => {
    const at = part.indexOf('=');
    if (at < 0 && i === 0) map.set(first, part);
    else if (at < 0) map.set(part, 'on');
    // Several `cpus=` of one node add up.
    else {
      const key = part.slice(0, at);
      const had = map.get(key);
      map.set(key, had === undefined || key !== 'cpus' ? part.slice(at + 1) : `${had},${part.slice(at + 1)}`);
    }
  });
  return map;
}

export function size(option: string, text: string | undefined, fallbackMiB = false): number {
  const parsed = parseSize(fallbackMiB && /^\d+$/.test(text ?? '') ? `${text}M` : (text ?? ''));
  if (!parsed.ok) throw new UserError(`-${option}: ${parsed.error}`);
  return parsed.value;
}

export function whole(option: string, text: string | undefined): number {
  const value = Number(text);
  if (text === undefined || !Number.isInteger(value) || value < 0)
    throw new UserError(`-${option}: '${text ?? ''}' is not a whole number`);
  return value;
}

/** A name that an option does not have is the user's mistake. */
export function onlyKnown(option: string, given: Fields, known: readonly string[]): void {
  for (const name of given.keys())
    if (!known.includes(name)) throw new UserError(`-${option}: Property '${name}' not found`);
}
