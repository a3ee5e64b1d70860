/** Whole runs: determinism, replay, and the run protocol. */
import * as fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { Arena, buddyinfo, zoneinfo } from '@ebb/guest-kernel';
import { VIRTIO_BALLOON_F_REPORTING } from '@ebb/virtio';
import { GiB, MiB, NS_PER_S, PAGE_SIZE } from '@ebb/machine';
import { loadTrace } from '../compare/options.ts';
import { fidelity } from '../fidelity.ts';
import { freshGuest, spec } from '../scenarios/scenario.ts';
import { findScenario, runScenario } from '../scenarios/run-scenario.ts';
import { makePlan } from '../trace/replay-plan.ts';
import { hostBuffers, runBuffers } from './buffers.ts';
import { fileStorage } from './file-storage.ts';
import { guestOf, REPLAY_DISK_BYTES } from './guest-of.ts';
import { runInline } from './inline-run.ts';
import type { RunSpec } from './spec.ts';
import { runThreads, ThreadPool } from './threads-run.ts';
import { WorkerDied } from './worker-endpoint.ts';

test('an inline run is the same every time, byte for byte', async () => {
  const scenario = findScenario('reporting');
  const once = async (): Promise<string> => {
    const run = await runScenario(scenario, { schedule: 'inline', seed: 3, traceOut: true });
    const [arena] = run.outcome.arenas;
    return JSON.stringify([
      run.outcome.result,
      run.allocTrace.length,
      run.allocTrace.at(-1),
      buddyinfo(arena),
      zoneinfo(arena, 2),
    ]);
  };
  expect(await once()).toBe(await once());
});

describe('replay', () => {
  test.each(['reporting', 'hog', 'build'])(
    '%s ends as the real kernel did: free and cached pages within 1 percent, large share within 0.05',
    (name) => {
      const result = fidelity(loadTrace(name));
      expect(result.agrees).toBe(true);
      expect(result.ledgerViolations).toBe(0);
    },
  );

  test('a guest larger than its capture has the difference free', () => {
    const trace = loadTrace('reporting');
    const guest = guestOf(trace, { vcpus: 2, balloon: false, guestMemoryBytes: GiB });
    expect(guest.maxPfn - trace.maxPfn).toBe((GiB - trace.guestMemoryBytes) / PAGE_SIZE);
    expect(guest.start?.pages[guest.maxPfn - 1]).toBe(1);
  });

  test('a host without memory fails the run at once, and names the VM', () => {
    const trace = loadTrace('reporting');
    const plan = makePlan(trace, 2);
    const spec: RunSpec = {
      hostFrames: (320 * MiB) / PAGE_SIZE,
      backing: 'thp',
      vms: [
        {
          bootAtNs: 0,
          guest: guestOf(trace, { vcpus: 2, balloon: false }),
          program: { kind: 'replay', plan },
          diskBytes: REPLAY_DISK_BYTES,
        },
      ],
      vcpusPerVm: 2,
      workers: 1,
      sampleNs: NS_PER_S,
      graceNs: 0,
      traceOut: false,
      poison: 'edges',
    };
    const { result } = runInline(spec, runBuffers(spec, hostBuffers(320 * MiB)), (_vm, bytes) =>
      fileStorage(bytes),
    );
    expect([result.ok, result.why, result.vms[0].state, result.ledgerViolations]).toEqual([
      false,
      'VM 0: no host frame was free',
      'killed',
      0,
    ]);
    expect(result.endNs).toBeLessThan(plan.durationNs);
  });
});

test('wherever the host runs out of frames, the run ends, names the VM, and every frame is accounted for (I9, I24)', () => {
  let killed = 0;
  fc.assert(
    fc.property(fc.integer({ min: 0, max: (96 * MiB) / PAGE_SIZE }), fc.nat(), (frames, seed) => {
      const vm = (bootAtNs: number): RunSpec['vms'][number] => ({
        bootAtNs,
        guest: freshGuest(64 * MiB, { balloon: true }),
        program: {
          kind: 'touch-free',
          pages: 8192,
          order: seed % 3,
          rounds: 2,
          holdNs: 0,
          pauseNs: NS_PER_S,
        },
        balloonFeatures: [VIRTIO_BALLOON_F_REPORTING],
        balloonTargets: [[NS_PER_S / 2, 32 * MiB]],
        diskBytes: 0,
      });
      const small = spec(8 * MiB + frames * PAGE_SIZE, [vm(0), vm(NS_PER_S / 4)]);
      const buffers = runBuffers(small, hostBuffers(small.hostFrames * PAGE_SIZE));
      const { result } = runInline(small, buffers, (_vm, bytes) => fileStorage(bytes));
      const dead = result.vms.filter((v) => v.state === 'killed' || v.state === 'off');
      expect(result.ledgerViolations).toBe(0);
      expect(result.ok).toBe(result.why === '');
      expect(result.ok || /^VM \d: /.test(result.why)).toBe(true);
      if (result.ok) expect(dead).toEqual([]);
      else killed++;
    }),
    { numRuns: 30, seed: 20_261_121 },
  );
  expect(killed).toBeGreaterThan(5);
});

describe('the run protocol', () => {
  const smallSpec = (): RunSpec => ({
    ...findScenario('pressure').spec(1),
    workers: 2,
  });

  const dies = async (victim: string, afterMs: number): Promise<void> => {
    const spec = smallSpec();
    const buffers = runBuffers(spec, hostBuffers(spec.hostFrames * PAGE_SIZE));
    const pool = new ThreadPool(2);
    const run = runThreads(spec, buffers, pool);
    const worker = [pool.host, ...pool.cpus].find((w) => w.name === victim);
    setTimeout(() => void worker?.api.crash().catch(() => undefined), afterMs);
    await expect(run).rejects.toThrow(new RegExp(`worker '${victim}' died: crashed on request`));
    await expect(run).rejects.toBeInstanceOf(WorkerDied);
    await pool.close();
  };

  test.each(['host', 'cpu0', 'cpu1'])('the death of %s mid-run is reported by name, never a hang', (victim) =>
    dies(victim, 150),
  );

  test('the same at any moment: before the guest boots, at once, or later', async () => {
    await fc.assert(fc.asyncProperty(fc.constantFrom('host', 'cpu0', 'cpu1'), fc.nat({ max: 600 }), dies), {
      numRuns: 8,
      seed: 20_261_122,
      examples: [
        ['host', 0],
        ['cpu1', 0],
      ],
    });
  });

  test('a VM killed in the middle of a device wait ends the run at once, in threads too: its siblings are not waited for', async () => {
    // The balloon inflates into memory that the host does not have: vCPU 0 dies holding the balloon mutex.
    const base = findScenario('balloon').spec(1);
    const spec: RunSpec = { ...base, hostFrames: (420 * MiB) / PAGE_SIZE, workers: 2 };
    const pool = new ThreadPool(2);
    try {
      const { result } = await runThreads(spec, runBuffers(spec, hostBuffers(420 * MiB)), pool);
      expect([result.ok, result.vms[0].state]).toEqual([false, 'killed']);
    } finally {
      await pool.close();
    }
    const inline = runInline(spec, runBuffers(spec, hostBuffers(420 * MiB)), (_vm, bytes) =>
      fileStorage(bytes),
    );
    expect([inline.result.ok, inline.result.vms[0].state]).toEqual([false, 'killed']);
  });

  test('native formats: allocation events as tracefs text that our own import reads, device events as QEMU’s trace lines', async () => {
    const scenario = findScenario('balloon');
    const run = await runScenario(scenario, { schedule: 'inline', seed: 1, traceOut: true });
    const { importTraceText } = await import('../trace/import.ts');
    const imported = importTraceText(run.allocTrace.join('\n'), 'own trace');
    expect(imported.events.count).toBe(run.allocTrace.length);
    expect(
      run.outcome.result.deviceTrace.some((l) =>
        l.endsWith('virtio_balloon_to_target balloon target: 0x10000000 num_pages: 65536'),
      ),
    ).toBe(true);
    expect(
      run.outcome.result.deviceTrace.some((l) =>
        l.endsWith('virtio_balloon_set_config actual: 256 oldactual: 0'),
      ),
    ).toBe(true);
    expect(run.outcome.arenas[0]).toBeInstanceOf(Arena);
  });
});
