/**
 * The protocol checkers over a recorded trace: each rule is a sentence of the specification (virtio 1.2), and a breach
 * names it by section and title. What a trace does not show is not judged.
 */
import {
  STATUS_DRIVER_OK,
  STATUS_FEATURES_OK,
  VIRTIO_BALLOON_F_MUST_TELL_HOST,
  VIRTIO_F_INDIRECT_DESC,
} from '@ebb/virtio/uapi';
import { BalloonChecker } from './balloon-checker.ts';
import type { DeviceEvent, DeviceTrace } from './device-events.ts';
import { MemoryDeviceChecker } from './memory-device-checker.ts';
import {
  CHAIN_BYTES,
  CHAIN_LENGTH,
  CONSUME,
  EARLY_KICK,
  EXPOSED,
  FEATURES,
  INDIRECT,
  LATE_FEATURES,
  QUEUE_SIZE,
  STATUS,
  USED_ID,
  USED_LENGTH,
  type Breach,
  type Report,
} from './rules.ts';

interface Buffer {
  readonly writable: number;
}

/** Checks one device's events in order. */
class DeviceChecker {
  readonly #report: Report;
  #status = 0;
  #sawStatus = false;
  #offered: ReadonlySet<number> | null = null;
  #accepted: ReadonlySet<number> = new Set();
  readonly #sizes = new Map<number, number>();
  readonly #out = new Map<string, Buffer>();
  readonly #balloon: BalloonChecker;
  readonly #memory: MemoryDeviceChecker;

  /** `guessedBlock`: bytes of a block of a memory device whose configuration the trace does not show. */
  constructor(report: Report, guessedBlock: number) {
    this.#report = report;
    this.#balloon = new BalloonChecker(report);
    this.#memory = new MemoryDeviceChecker(report, guessedBlock);
  }

  event(e: DeviceEvent): void {
    switch (e.event) {
      case 'status':
        this.#onStatus(e.value);
        break;
      case 'features': {
        this.#offered = new Set(e.offered);
        const foreign = e.accepted.filter((bit) => !e.offered.includes(bit));
        if (foreign.length > 0)
          this.#report(FEATURES, 'driver', `accepted bit ${foreign.join(', ')}, not offered`);
        if ((this.#status & STATUS_FEATURES_OK) !== 0)
          this.#report(LATE_FEATURES, 'driver', 'accepted features after FEATURES_OK');
        this.#accepted = new Set(e.accepted);
        break;
      }
      case 'queue':
        this.#sizes.set(e.queue, e.size);
        if (e.size < 1 || e.size > 32768 || (e.size & (e.size - 1)) !== 0)
          this.#report(QUEUE_SIZE, 'driver', `queue ${e.queue} has size ${e.size}`);
        break;
      case 'avail':
        this.#onAvail(e);
        break;
      case 'kick':
        if (this.#sawStatus && (this.#status & STATUS_DRIVER_OK) === 0)
          this.#report(EARLY_KICK, 'driver', `kicked queue ${e.queue} before DRIVER_OK`);
        break;
      case 'used':
        this.#onUsed(e);
        break;
      case 'interrupt':
        if (e.queue !== undefined && this.#sawStatus && (this.#status & STATUS_DRIVER_OK) === 0)
          this.#report(CONSUME, 'device', `interrupted for queue ${e.queue} before DRIVER_OK`);
        break;
      case 'config-write':
        this.#memory.configWrite(e);
        break;
      case 'inflate':
      case 'deflate':
      case 'actual':
        this.#balloon.event(e);
        break;
      case 'target':
        this.#balloon.newTarget(this.#accepted.has(VIRTIO_BALLOON_F_MUST_TELL_HOST));
        break;
      // Pages reported are seen again only as buffers.
      case 'report':
        break;
      case 'mem-config':
      case 'usable':
      case 'unplugged-all':
      case 'plug':
      case 'unplug':
      case 'unplug-all':
      case 'state':
      case 'response':
        this.#memory.event(e);
        break;
    }
  }

  #onStatus(value: number): void {
    this.#sawStatus = true;
    if (value === 0) {
      // A reset: buffers are the driver's again, pages of the balloon the guest's, and no request is out.
      this.#balloon.reset();
      this.#memory.reset();
      this.#out.clear();
      this.#sizes.clear();
      this.#accepted = new Set();
    } else if ((this.#status & ~value) !== 0) {
      this.#report(
        STATUS,
        'driver',
        `cleared 0x${(this.#status & ~value).toString(16)} by writing 0x${value.toString(16)}`,
      );
    }
    this.#status = value;
  }

  // ── Queues ───────────────────────────────────────────────────────────────────────────────────────────────────────

  #onAvail(e: Extract<DeviceEvent, { event: 'avail' }>): void {
    const key = `${e.queue}:${e.head}`;
    if (this.#out.has(key))
      this.#report(
        EXPOSED,
        'driver',
        `head ${e.head} of queue ${e.queue} was made available again before it came back`,
      );
    const size = this.#sizes.get(e.queue);
    const count = e.out.length + e.in.length;
    if (size !== undefined && count > size)
      this.#report(CHAIN_LENGTH, 'driver', `a chain of ${count} in queue ${e.queue} of size ${size}`);
    const bytes = [...e.out, ...e.in].reduce((sum, [, length]) => sum + length, 0);
    if (bytes > 2 ** 32) this.#report(CHAIN_BYTES, 'driver', `a chain of ${bytes} bytes`);
    if (e.indirect === true && this.#offered !== null && !this.#accepted.has(VIRTIO_F_INDIRECT_DESC))
      this.#report(INDIRECT, 'driver', `an indirect descriptor in queue ${e.queue}`);
    this.#out.set(key, { writable: e.in.reduce((sum, [, length]) => sum + length, 0) });
  }

  #onUsed(e: Extract<DeviceEvent, { event: 'used' }>): void {
    const key = `${e.queue}:${e.head}`;
    const buffer = this.#out.get(key);
    if (this.#sawStatus && (this.#status & STATUS_DRIVER_OK) === 0)
      this.#report(CONSUME, 'device', `returned a buffer of queue ${e.queue} before DRIVER_OK`);
    if (buffer === undefined) {
      this.#report(USED_ID, 'device', `returned head ${e.head} of queue ${e.queue}, which is not out`);
      return;
    }
    if (e.length > buffer.writable)
      this.#report(
        USED_LENGTH,
        'device',
        `says it wrote ${e.length} bytes into ${buffer.writable} writable ones`,
      );
    this.#out.delete(key);
  }
}

export interface TraceVerdict {
  readonly events: number;
  readonly skipped: number;
  readonly devices: readonly string[];
  readonly breaches: readonly Breach[];
}

/** QEMU's log names no block size; the largest request is a whole Linux memory block of 128 MiB. */
function guessBlock(trace: DeviceTrace): number {
  let most = 1;
  for (const { event } of trace.events)
    if (event.event === 'plug' || event.event === 'unplug') most = Math.max(most, event.nb_blocks);
  return (128 * 2 ** 20) / most;
}

/** Judges every device of the trace. */
export function checkTrace(trace: DeviceTrace): TraceVerdict {
  const checkers = new Map<string, DeviceChecker>();
  const breaches: Breach[] = [];
  let line = 0;
  for (const { line: number, event } of trace.events) {
    line = number;
    const device = event.device ?? 'device';
    let checker = checkers.get(device);
    if (checker === undefined) {
      checker = new DeviceChecker(
        (rule, who, what) => breaches.push({ ...rule, line, who, what }),
        guessBlock(trace),
      );
      checkers.set(device, checker);
    }
    checker.event(event);
  }
  return { events: trace.events.length, skipped: trace.skipped, devices: [...checkers.keys()], breaches };
}
