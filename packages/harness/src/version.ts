/** Ebb's version, carried by every result. */
export const EBB_VERSION = '0.1.0';
