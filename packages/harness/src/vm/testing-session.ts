/** A session of `ebb vm` on one thread, for tests: its loop with inline windows. */
import { InlineExitPort, inlineSchedule, MiB } from '@ebb/machine';
import { orderPins } from '../run/agent-program.ts';
import { hostBuffers, runBuffers } from '../run/buffers.ts';
import { CpuSide } from '../run/cpu-side.ts';
import { fileStorage } from '../run/file-storage.ts';
import { HostSide } from '../run/host-side.ts';
import { heldBlocks, sessionSpec } from './commands.ts';
import { parseCommandLine } from './command-line.ts';
import { SessionLoop } from './session-loop.ts';

/** A session on one thread: the loop of `ebb vm` with inline windows. */
export function session(
  args: readonly string[],
  hostBytes = 1024 * MiB,
): { loop: SessionLoop; run: Promise<string>; host: HostSide } {
  const description = parseCommandLine(args);
  const spec = sessionSpec(description, hostBytes);
  const buffers = runBuffers(spec, hostBuffers(hostBytes));
  // Both are made below; devices speak only once the loop runs.
  const holder: { loop: SessionLoop | null } = { loop: null };
  const host = new HostSide(spec, buffers, (_vm, bytes) => fileStorage(bytes), inlineSchedule, undefined, {
    size: (id, bytes) => holder.loop?.sizeChanged(id, bytes),
    balloon: (bytes) => holder.loop?.balloonChanged(bytes),
    dimm: (news) => holder.loop?.dimmNews(news),
  });
  const cpus = new CpuSide(spec, buffers, -1, new InlineExitPort(() => void host.poll()), inlineSchedule);
  const windows = {
    nextDue: Number.POSITIVE_INFINITY,
    othersDue: Number.POSITIVE_INFINITY,
    async run(): Promise<boolean> {
      windows.nextDue = cpus.runWindow(host.windowEnd);
      while (host.poll());
      await Promise.resolve();
      return true;
    },
  };
  const loop = new SessionLoop(description, host, windows);
  holder.loop = loop;
  const held = heldBlocks(description, undefined);
  if (held.length > 0) void loop.do(() => orderPins(new Int32Array(buffers.handles[0]), held));
  return { loop, run: loop.run(), host };
}
