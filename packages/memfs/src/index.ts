/** The memory file system. */
export * from './backing.ts';
export * from './mem-file.ts';
