/** A seeded fault: one edit in one place of the sources, what it stands for, and what must catch it. */

/** What catches a fault: properties under the controlled schedule, or a test file. */
export type Catcher =
  | { readonly properties: readonly string[] }
  /** Test file from the top of the repository, and the project it belongs to. */
  | { readonly test: string };

export interface Mutant {
  readonly name: string;
  /** From the top of the repository. */
  readonly file: string;
  /** Occurs exactly once; a fault whose text is gone fails. */
  readonly find: string;
  readonly replace: string;
  /** Row, invariant or public bug. */
  readonly stands: string;
  readonly by: Catcher;
}

export function fault(
  name: string,
  file: string,
  find: string,
  replace: string,
  stands: string,
  by: Catcher,
): Mutant {
  return { name, file, find, replace, stands, by };
}

/** Caught by searching these properties. */
export const props = (...properties: string[]): Catcher => ({ properties });

/** Caught by this test, from `packages/`. */
export const test = (path: string): Catcher => ({ test: `packages/${path}` });

/** A fault that cannot matter, with the argument. */
export interface Equivalent {
  readonly name: string;
  readonly reason: string;
}
