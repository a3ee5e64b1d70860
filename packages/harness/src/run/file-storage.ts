/** A virtual disk in a sparse host file, removed when the process ends. Node only. */
import {
  closeSync,
  fsyncSync,
  ftruncateSync,
  mkdtempSync,
  openSync,
  readSync,
  rmSync,
  unlinkSync,
  writeSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { BlockStorage } from '@ebb/host-kvm';

/** A disk of `bytes` in a fresh file that already has no name: nothing is left behind. `sync`: flush really syncs. */
export function fileStorage(bytes: number, sync = false): BlockStorage & { close(): void } {
  const folder = mkdtempSync(join(tmpdir(), 'ebb-disk-'));
  const path = join(folder, 'disk');
  const fd = openSync(path, 'w+');
  unlinkSync(path);
  rmSync(folder, { recursive: true });
  ftruncateSync(fd, bytes);
  return {
    bytes,
    read(offset, out) {
      const n = readSync(fd, out, 0, out.length, offset);
      if (n < out.length) out.fill(0, n);
    },
    write(offset, data) {
      writeSync(fd, data, 0, data.length, offset);
    },
    flush() {
      if (sync) fsyncSync(fd);
    },
    close() {
      closeSync(fd);
    },
  };
}
