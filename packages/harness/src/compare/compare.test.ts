/** Counting how many VMs fit, with a host that is none: what it can hold is known. */
import { expect, test } from 'vitest';
import { countFor, type Attempt } from './compare.ts';

/** A host for `fits` VMs: the one too many ends an open run when it starts, or while it boots. */
const host =
  (fits: number, how: 'at its start' | 'while it boots', asked: [number, boolean][] = []) =>
  (vms: number, exact: boolean): Promise<Attempt> => {
    asked.push([vms, exact]);
    const ok = vms <= fits;
    const why = ok
      ? ''
      : how === 'at its start'
        ? 'VM 3 has no memory to start'
        : 'VM 3: the host has no frame left';
    const on = ok ? vms : how === 'at its start' ? fits : fits + 1;
    return Promise.resolve({
      ok,
      why,
      vms: Array.from({ length: vms }, (_, i) => ({ state: i < on ? 'running' : 'off' })),
    });
  };

test.each(['at its start', 'while it boots'] as const)(
  'as many VMs as the host holds, asked for once exactly (the one too many fails %s)',
  async (how) => {
    for (const fits of [1, 2, 5]) {
      const asked: [number, boolean][] = [];
      const { count, ok } = await countFor({ vms: undefined, maxVms: 8 }, 1, host(fits, how, asked));
      expect([count, ok, asked]).toEqual([
        fits,
        true,
        [
          [8, false],
          [fits, true],
        ],
      ]);
    }
    const asked: [number, boolean][] = [];
    expect((await countFor({ vms: undefined, maxVms: 3 }, 1, host(5, how, asked))).count).toBe(3);
    expect(asked).toEqual([[3, false]]);
    expect(await countFor({ vms: undefined, maxVms: 4 }, 1, host(0, how))).toMatchObject({
      count: 0,
      ok: false,
    });
  },
);

test('a number that was asked for fits, or does not', async () => {
  expect(await countFor({ vms: 4, maxVms: 64 }, 1, host(4, 'at its start'))).toMatchObject({
    count: 4,
    ok: true,
  });
  expect(await countFor({ vms: 5, maxVms: 64 }, 1, host(4, 'at its start'))).toMatchObject({
    count: 0,
    ok: false,
  });
});
