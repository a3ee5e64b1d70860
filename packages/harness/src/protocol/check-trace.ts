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
import type { DeviceEvent, DeviceTrace } from './device-events.ts';

interface Rule {
  readonly section: string;
  readonly title: string;
  readonly must: string;
}

interface Breach extends Rule {
  readonly line: number;
  readonly who: 'driver' | 'device';
  readonly what: string;
}

const STATUS: Rule = {
  section: '2.1.1',
  title: 'Driver Requirements: Device Status Field',
  must: 'The driver MUST NOT clear a device status bit.',
};
const CONSUME: Rule = {
  section: '2.1.2',
  title: 'Device Requirements: Device Status Field',
  must: 'The device MUST NOT consume buffers or send any used buffer notifications to the driver before DRIVER_OK.',
};
const FEATURES: Rule = {
  section: '2.2.1',
  title: 'Driver Requirements: Feature Bits',
  must: 'The driver MUST NOT accept a feature which the device did not offer.',
};
const LATE_FEATURES: Rule = {
  section: '3.1.1',
  title: 'Driver Requirements: Device Initialization',
  must: 'The driver MUST NOT accept new feature bits after this step.',
};
const EARLY_KICK: Rule = {
  section: '3.1.1',
  title: 'Driver Requirements: Device Initialization',
  must: 'The driver MUST NOT send any buffer available notifications to the device before setting DRIVER_OK.',
};
const QUEUE_SIZE: Rule = {
  section: '2.7',
  title: 'Split Virtqueues',
  must: 'Queue Size value is always a power of 2; its maximum is 32768.',
};
const CHAIN_LENGTH: Rule = {
  section: '2.7.5.3.1',
  title: 'Driver Requirements: Indirect Descriptors',
  must: 'A driver MUST NOT create a descriptor chain longer than the Queue Size of the device.',
};
const CHAIN_BYTES: Rule = {
  section: '2.7.5.1',
  title: 'Driver Requirements: The Virtqueue Descriptor Table',
  must: 'Drivers MUST NOT add a descriptor chain longer than 2^32 bytes in total.',
};
const INDIRECT: Rule = {
  section: '2.7.5.3.1',
  title: 'Driver Requirements: Indirect Descriptors',
  must: 'The driver MUST NOT set the VIRTQ_DESC_F_INDIRECT flag unless the VIRTIO_F_INDIRECT_DESC feature was negotiated.',
};
const EXPOSED: Rule = {
  section: '3.2.1',
  title: 'Supplying Buffers to The Device',
  must: 'A driver MUST NOT alter virtqueue entries for exposed buffers.',
};
const USED_ID: Rule = {
  section: '2.7.8',
  title: 'The Virtqueue Used Ring',
  must: 'Each entry refers to a descriptor chain that the driver made available and that was not returned since.',
};
const USED_LENGTH: Rule = {
  section: '2.7.8.2',
  title: 'Device Requirements: The Virtqueue Used Ring',
  must: 'The device MUST write at least len bytes to descriptor, beginning at the first device-writable buffer.',
};
const INFLATED: Rule = {
  section: '5.5.6.1',
  title: 'Driver Requirements: Device Operation (Traditional Memory Balloon)',
  must: 'The driver MUST NOT request deflation of pages in the balloon before the device has acknowledged the inflate request.',
};
const TELL_HOST: Rule = {
  section: '5.5.6.1',
  title: 'Driver Requirements: Device Operation (Traditional Memory Balloon)',
  must: 'The driver MUST use the deflateq to inform the device of pages that it wants to use from the balloon.',
};
const ACTUAL: Rule = {
  section: '5.5.6.1',
  title: 'Driver Requirements: Device Operation (Traditional Memory Balloon)',
  must: 'The driver MUST update actual after changing the number of pages in the balloon.',
};
const ACTUAL_KEPT: Rule = {
  section: '2.5.2',
  title: 'Device Requirements: Device Configuration Space',
  must: 'The device MUST present the value last written to a field that the driver may write.',
};
const MEM_ERROR: Rule = {
  section: '5.15.6.2',
  title: 'Device Requirements: Device Operation: VIRTIO_MEM_REQ_PLUG',
  must: 'The device MUST reject requests with VIRTIO_MEM_RESP_ERROR if any memory block in the requested range is already plugged.',
};
const MEM_UNPLUG_ERROR: Rule = {
  section: '5.15.6.4',
  title: 'Device Requirements: Device Operation: VIRTIO_MEM_REQ_UNPLUG',
  must: 'The device MUST reject requests with VIRTIO_MEM_RESP_ERROR if any memory block in the requested range is already unplugged.',
};
const MEM_RANGE: Rule = {
  section: '5.15.6.2',
  title: 'Device Requirements: Device Operation: VIRTIO_MEM_REQ_PLUG',
  must: 'The device MUST reject requests with VIRTIO_MEM_RESP_ERROR if addr is not aligned to the block_size, if nb_blocks is not greater than 0, or if any memory block is not within the usable device-managed region.',
};
const MEM_RESPONSE: Rule = {
  section: '5.15.6',
  title: 'Device Operation (Memory Device)',
  must: 'The device answers each request with one response: the driver waits for it before the next request.',
};
const MEM_SHRINK: Rule = {
  section: '5.15.4.2',
  title: 'Device Requirements: Device configuration layout (Memory Device)',
  must: 'The device MUST NOT shrink usable_region_size, except when processing an UNPLUG ALL request, or during a device or system reset.',
};
const MEM_CONFIG: Rule = {
  section: '5.15.4.2',
  title: 'Device Requirements: Device configuration layout (Memory Device)',
  must: 'The device MUST set block_size to a power of two, and addr, region_size and usable_region_size to multiples of block_size.',
};
const MEM_CONFIG_WRITE: Rule = {
  section: '5.15.4.1',
  title: 'Driver Requirements: Device configuration layout (Memory Device)',
  must: 'The driver MUST NOT write to device configuration fields.',
};
const REPORTED_TWICE: Rule = {
  section: '5.5.6.7.1',
  title: 'Driver Requirements: Free Page Reporting',
  must: 'The driver MUST NOT use the reported pages until the device has acknowledged the reporting request.',
};

/** Answer of a request (5.15.6). */
const ACK = 0;

/** What a memory device's trace shows. */
type MemEvent = Extract<
  DeviceEvent,
  {
    event:
      | 'mem-config'
      | 'usable'
      | 'unplugged-all'
      | 'plug'
      | 'unplug'
      | 'unplug-all'
      | 'state'
      | 'response';
  }
>;

interface Buffer {
  readonly writable: number;
}

/** Checks one device's events in order. */
class DeviceChecker {
  readonly #report: (rule: Rule, who: Breach['who'], what: string) => void;
  #status = 0;
  #sawStatus = false;
  #offered: ReadonlySet<number> | null = null;
  #accepted: ReadonlySet<number> = new Set();
  readonly #sizes = new Map<number, number>();
  readonly #out = new Map<string, Buffer>();
  readonly #inBalloon = new Set<number>();
  #balloonBook = false;
  /** Pages by our count since the driver last told; −1: nothing to tell. */
  #untold = -1;
  #actual = -1;
  readonly #reported = new Map<string, readonly (readonly [number, number])[]>();
  // ── Memory device ──
  readonly #plugged = new Set<number>();
  #block = 0;
  readonly #guessedBlock: number;
  #request: Extract<DeviceEvent, { event: 'plug' | 'unplug' | 'unplug-all' | 'state' }> | null = null;
  #region: { addr: number; usable: number } | null = null;
  #resetting = true;

  /** `guessedBlock`: bytes of a block of a memory device whose configuration the trace does not show. */
  constructor(report: (rule: Rule, who: Breach['who'], what: string) => void, guessedBlock: number) {
    this.#report = report;
    this.#guessedBlock = guessedBlock;
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
        if (this.#block > 0)
          this.#report(MEM_CONFIG_WRITE, 'driver', `wrote ${e.value} at offset ${e.offset}`);
        break;
      case 'inflate':
      case 'deflate':
      case 'report':
      case 'actual':
      case 'target':
        this.#onBalloon(e);
        break;
      case 'mem-config':
      case 'usable':
      case 'unplugged-all':
      case 'plug':
      case 'unplug':
      case 'unplug-all':
      case 'state':
      case 'response':
        this.#onMem(e);
        break;
    }
  }

  #onStatus(value: number): void {
    this.#sawStatus = true;
    if (value === 0) {
      // A reset: buffers are the driver's again.
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
    this.#reported.set(key, e.in);
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
    this.#reported.delete(key);
  }

  // ── Balloon ──────────────────────────────────────────────────────────────────────────────────────────────────────

  #onBalloon(
    e: Extract<DeviceEvent, { event: 'inflate' | 'deflate' | 'report' | 'actual' | 'target' }>,
  ): void {
    switch (e.event) {
      case 'inflate':
        this.#balloonBook = true;
        for (const pfn of e.pfns) {
          if (this.#inBalloon.has(pfn))
            this.#report(
              TELL_HOST,
              'driver',
              `page ${pfn} is put into the balloon again without having been taken out`,
            );
          this.#inBalloon.add(pfn);
        }
        this.#untold = this.#inBalloon.size;
        break;
      case 'deflate':
        for (const pfn of e.pfns) {
          if (this.#balloonBook && !this.#inBalloon.has(pfn))
            this.#report(INFLATED, 'driver', `page ${pfn} is taken out and was not in`);
          this.#inBalloon.delete(pfn);
        }
        this.#untold = this.#inBalloon.size;
        break;
      case 'report':
        for (const [addr, length] of e.ranges)
          for (const pending of this.#reported.values())
            if (pending.some(([a, n]) => addr < a + n && a < addr + length))
              this.#report(
                REPORTED_TWICE,
                'driver',
                `0x${addr.toString(16)} is reported while an earlier report of it is out`,
              );
        break;
      case 'actual':
        if (e.before !== undefined && this.#actual >= 0 && e.before !== this.#actual)
          this.#report(
            ACTUAL_KEPT,
            'device',
            `actual was ${e.before}, the driver had written ${this.#actual}`,
          );
        if (this.#untold >= 0 && e.pages !== this.#untold)
          this.#report(ACTUAL, 'driver', `wrote ${e.pages}; the balloon holds ${this.#untold} pages`);
        this.#actual = e.pages;
        this.#untold = -1;
        break;
      case 'target':
        // Told nothing since the pages changed, and already the next command.
        if (
          this.#untold >= 0 &&
          this.#untold !== this.#actual &&
          this.#accepted.has(VIRTIO_BALLOON_F_MUST_TELL_HOST)
        )
          this.#report(
            ACTUAL,
            'driver',
            `the balloon holds ${this.#untold} pages, actual still says ${this.#actual}`,
          );
        break;
    }
  }

  // ── Memory device ────────────────────────────────────────────────────────────────────────────────────────────────

  #onMem(e: MemEvent): void {
    switch (e.event) {
      case 'mem-config': {
        this.#block = e.block_size;
        this.#region = { addr: e.addr, usable: e.usable_region_size };
        const odd = [e.addr, e.region_size, e.usable_region_size].some((v) => v % e.block_size !== 0);
        if (e.block_size < 1 || (e.block_size & (e.block_size - 1)) !== 0 || odd)
          this.#report(MEM_CONFIG, 'device', `block_size ${e.block_size}, addr 0x${e.addr.toString(16)}`);
        break;
      }
      case 'usable':
        if (e.after < e.before && !this.#resetting && this.#request?.event !== 'unplug-all')
          this.#report(MEM_SHRINK, 'device', `from 0x${e.before.toString(16)} to 0x${e.after.toString(16)}`);
        if (this.#region !== null) this.#region = { ...this.#region, usable: e.after };
        break;
      case 'unplugged-all':
        this.#resetting = true;
        this.#plugged.clear();
        break;
      case 'plug':
      case 'unplug':
      case 'unplug-all':
      case 'state':
        this.#resetting = false;
        if (this.#request !== null)
          this.#report(MEM_RESPONSE, 'driver', `${e.event} while ${this.#request.event} was not answered`);
        this.#request = e;
        break;
      case 'response':
        this.#answer(e.type);
        break;
    }
  }

  #answer(type: number): void {
    const request = this.#request;
    this.#request = null;
    if (request === null) {
      this.#report(MEM_RESPONSE, 'device', 'a response without a request');
      return;
    }
    if (type !== ACK) return;
    if (request.event === 'unplug-all') {
      this.#plugged.clear();
      return;
    }
    if (request.event === 'state') return;
    const block = this.#block === 0 ? this.#guessedBlock : this.#block;
    const { addr, nb_blocks: count } = request;
    const outside =
      this.#region !== null &&
      (addr < this.#region.addr || addr + count * block > this.#region.addr + this.#region.usable);
    if (count < 1 || addr % block !== 0 || outside)
      this.#report(
        MEM_RANGE,
        'device',
        `acknowledged ${request.event} of ${count} blocks at 0x${addr.toString(16)}`,
      );
    for (let i = 0; i < count; i++) {
      const at = addr + i * block;
      const was = this.#plugged.has(at);
      if (request.event === 'plug') {
        if (was)
          this.#report(MEM_ERROR, 'device', `acknowledged plug of 0x${at.toString(16)}, which is plugged`);
        this.#plugged.add(at);
      } else {
        if (!was)
          this.#report(
            MEM_UNPLUG_ERROR,
            'device',
            `acknowledged unplug of 0x${at.toString(16)}, which is not plugged`,
          );
        this.#plugged.delete(at);
      }
    }
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
