import { afterEach, expect, test, vi } from 'vitest';
import { pageAligned } from './page-aligned.ts';

afterEach(() => vi.unstubAllGlobals());

test('page-aligned memory is shared, zeroed and large enough', () => {
  for (const bytes of [1, 65_536, 65_537]) {
    const buffer = pageAligned(bytes);
    expect(buffer).toBeInstanceOf(SharedArrayBuffer);
    // Whole pages of WebAssembly's.
    expect(buffer.byteLength).toBe(65_536 * Math.ceil(bytes / 65_536));
    expect(new Uint8Array(buffer).every((byte) => byte === 0)).toBe(true);
  }
});

test('where WebAssembly has no memory to give, an ordinary buffer does', () => {
  // `new` of what is no constructor throws, as a lack of address space does.
  vi.stubGlobal('WebAssembly', { Memory: () => undefined });
  const buffer = pageAligned(4096);
  expect([buffer instanceof SharedArrayBuffer, buffer.byteLength]).toEqual([true, 4096]);
});
