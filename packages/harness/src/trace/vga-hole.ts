/** 640 KiB to 1 MiB, in pages: the PC's hole in RAM. */
export const VGA_HOLE_START = 160;
export const VGA_HOLE_END = 256;
