/** The allowed imports of the six packages (DESIGN § 1), read from the sources themselves. A forbidden import fails CI. */
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';

const ROOT = join(import.meta.dirname, '..', 'packages');

/** Per package: which specifiers its sources may import besides relative ones. */
const ALLOWED: Record<string, readonly string[]> = {
  machine: [],
  virtio: ['@ebb/machine'],
  memfs: ['@ebb/machine'],
  'guest-kernel': ['@ebb/machine', '@ebb/virtio/uapi', '@ebb/virtio/driver'],
  'host-kvm': ['@ebb/machine', '@ebb/memfs', '@ebb/virtio/uapi', '@ebb/virtio/device'],
};
/** Tests of any package may use both sides of virtio and its raw ring writer, and the test libraries. */
const IN_TESTS = [
  '@ebb/machine',
  '@ebb/virtio/uapi',
  '@ebb/virtio/driver',
  '@ebb/virtio/device',
  '@ebb/virtio/testing',
  'vitest',
  '@fast-check/vitest',
  'fast-check',
];

function sources(folder: string): string[] {
  return readdirSync(folder, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile() && entry.name.endsWith('.ts'))
    .map((entry) => join(entry.parentPath, entry.name));
}

/** Module specifiers of a source text: static imports, re-exports and dynamic imports. */
export function specifiers(text: string): string[] {
  return [
    ...text.matchAll(
      /(?:^|\n)\s*(?:import|export)\s[^'"]*?from\s+['"]([^'"]+)['"]|import\(\s*['"]([^'"]+)['"]|(?:^|\n)\s*import\s+['"]([^'"]+)['"]/g,
    ),
  ].map((m) => m[1] ?? m[2] ?? m[3] ?? '');
}

/** Forbidden imports of one file. */
export function forbidden(name: string, path: string, text: string): string[] {
  const isTest = /\.test\.ts$|\/testing-[^/]*\.ts$/.test(path);
  const allowed = new Set([...(ALLOWED[name] ?? []), ...(isTest ? IN_TESTS : [])]);
  return specifiers(text).filter((specifier) => {
    if (specifier.startsWith('.'))
      return (
        specifier.startsWith('../../..') ||
        /\.\.\/(?:machine|virtio|memfs|guest-kernel|host-kvm|harness)\//.test(specifier)
      );
    return !allowed.has(specifier);
  });
}

describe('package boundaries', () => {
  test.each(Object.keys(ALLOWED))('%s imports only what it may', (name) => {
    const bad = sources(join(ROOT, name, 'src')).flatMap((path) =>
      forbidden(name, path, readFileSync(path, 'utf8')).map((s) => `${path}: ${s}`),
    );
    expect(bad).toEqual([]);
  });

  test('nothing below the harness depends on it, and its dependencies are declared', () => {
    for (const name of Object.keys(ALLOWED)) {
      const manifest = JSON.parse(readFileSync(join(ROOT, name, 'package.json'), 'utf8')) as {
        dependencies?: Record<string, string>;
      };
      const declared = Object.keys(manifest.dependencies ?? {});
      expect(declared).not.toContain('@ebb/harness');
      const wanted = new Set((ALLOWED[name] ?? []).map((s) => s.split('/').slice(0, 2).join('/')));
      expect(new Set(declared)).toEqual(wanted);
    }
  });

  test('the check itself bites', () => {
    expect(forbidden('guest-kernel', 'src/x.ts', "import { Vm } from '@ebb/host-kvm';")).toEqual([
      '@ebb/host-kvm',
    ]);
    expect(forbidden('host-kvm', 'src/x.ts', "import { Arena } from '@ebb/guest-kernel';")).toEqual([
      '@ebb/guest-kernel',
    ]);
    expect(forbidden('machine', 'src/x.ts', "import { readFileSync } from 'node:fs';")).toEqual(['node:fs']);
    expect(forbidden('memfs', 'src/x.ts', "export * from '../../host-kvm/src/index.ts';")).toEqual([
      '../../host-kvm/src/index.ts',
    ]);
    expect(forbidden('virtio', 'src/device/x.ts', "import { x } from '../uapi/index.ts';")).toEqual([]);
  });

  test('no clock, timer or randomness outside the seams', () => {
    for (const name of Object.keys(ALLOWED)) {
      for (const path of sources(join(ROOT, name, 'src'))) {
        if (path.endsWith('.test.ts')) continue;
        const code = readFileSync(path, 'utf8').replace(/\/\*[\s\S]*?\*\/|\/\/.*$/gm, '');
        expect(/Math\.random|Date\.now|performance\.now|setTimeout|new Date\(/.test(code), path).toBe(false);
      }
    }
  });
});
