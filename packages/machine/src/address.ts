/**
 * One address space, one type. Addresses are bytes and may exceed 32 bits: never use a bitwise operator on one
 * (`2 ** 33 >> 12` is 0). Frame numbers are int32 and may be shifted.
 *
 * | type | space | | type | space |
 * | --- | --- | --- | --- | --- |
 * | `Gpa` | guest-physical byte | | `Hpa` | host-physical byte |
 * | `Gfn` | guest frame number | | `Hfn` | host frame number |
 *
 * In guest-kernel code `pfn` is the guest's own frame number; it equals a `Gfn`.
 */
import { PAGE_SIZE } from './units.ts';

declare const space: unique symbol;
type Branded<Name extends string> = number & { readonly [space]: Name };

export type Gpa = Branded<'gpa'>;
export type Gfn = Branded<'gfn'>;
export type Hpa = Branded<'hpa'>;
export type Hfn = Branded<'hfn'>;

export function gpa(bytes: number): Gpa {
  return bytes as Gpa;
}
export function gfn(frame: number): Gfn {
  return frame as Gfn;
}
export function hfn(frame: number): Hfn {
  return frame as Hfn;
}
/** The frame that holds the byte at `address`. */
export function gfnOf(address: Gpa): Gfn {
  return Math.floor(address / PAGE_SIZE) as Gfn;
}
/** First byte of frame `frame`. */
export function gpaOf(frame: Gfn): Gpa {
  return (frame * PAGE_SIZE) as Gpa;
}
/** Byte offset of `address` (below 2⁵³) inside its page, `0 … 4095`. `%` on a double is a slow library call; this is not. */
export function pageOffset(address: number): number {
  if (address <= 0x7fff_ffff) return address & (PAGE_SIZE - 1);
  return address - Math.floor(address * (1 / PAGE_SIZE)) * PAGE_SIZE;
}
