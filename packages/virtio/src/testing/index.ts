/** For tests of any package. */
export * from './raw-ring.ts';
export * from './rig.ts';
