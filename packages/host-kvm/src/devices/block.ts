/**
 * virtio-blk, device 2: read, write, flush over synchronous storage that the platform injects (virtio 1.2 § 5.2). The
 * header is read once, validated, and the status byte is written before the buffer is returned.
 */
import { PAGE_SIZE } from '@ebb/machine';
import {
  BLK_CFG_CAPACITY,
  BLK_HEADER_BYTES,
  Features,
  SECTOR_BYTES,
  VIRTIO_BLK_F_FLUSH,
  VIRTIO_BLK_S_IOERR,
  VIRTIO_BLK_S_OK,
  VIRTIO_BLK_S_UNSUPP,
  VIRTIO_BLK_T_FLUSH,
  VIRTIO_BLK_T_IN,
  VIRTIO_BLK_T_OUT,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_INDIRECT_DESC,
  VIRTIO_F_VERSION_1,
  VIRTIO_ID_BLOCK,
} from '@ebb/virtio/uapi';
import type { DescriptorChain, DeviceHost, SplitDeviceQueue, VirtioDevice } from '@ebb/virtio/device';
import type { TaskYield } from '../host-tasks.ts';
import { DeviceTimeline, QueueRunner, type DevicePort } from './device-port.ts';

/** Where a disk's bytes are: a host file in Node, a buffer in tests. Offsets and lengths are bytes. Failures are thrown. */
export interface BlockStorage {
  readonly bytes: number;
  read(offset: number, out: Uint8Array): void;
  write(offset: number, bytes: Uint8Array): void;
  flush(): void;
}

export interface BlockCounters {
  reads: number;
  writes: number;
  flushes: number;
  bytesRead: number;
  bytesWritten: number;
  errors: number;
}

/** Largest transfer of one request; a longer one is an I/O error, not an allocation. */
const MAX_REQUEST_BYTES = 4 * 1024 * 1024;

export class BlockDevice implements VirtioDevice {
  readonly deviceId: number = VIRTIO_ID_BLOCK;
  readonly offered: Features = Features.of(
    VIRTIO_BLK_F_FLUSH,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_VERSION_1,
  );
  readonly configBytes = 8;
  readonly queueMax: readonly number[] = [256];
  readonly counters: BlockCounters = {
    reads: 0,
    writes: 0,
    flushes: 0,
    bytesRead: 0,
    bytesWritten: 0,
    errors: 0,
  };
  readonly #storage: BlockStorage;
  readonly #port: DevicePort;
  readonly #runner: QueueRunner;
  readonly #timeline = new DeviceTimeline();
  readonly #buffer = new Uint8Array(MAX_REQUEST_BYTES);
  #host: DeviceHost | null = null;
  #queue: SplitDeviceQueue | null = null;

  constructor(storage: BlockStorage, port: DevicePort) {
    this.#storage = storage;
    this.#port = port;
    this.#runner = new QueueRunner(port, 'blk', (_index, kicked) => this.#serve(kicked));
  }

  attach(host: DeviceHost): void {
    this.#host = host;
  }
  activate(queues: readonly (SplitDeviceQueue | null)[], _features: Features): void {
    this.#queue = queues[0] ?? null;
  }
  kick(_index: number): void {
    this.#runner.kick(0);
  }
  get idle(): boolean {
    return this.#runner.idle;
  }
  reset(): void {
    this.#queue = null;
  }
  readConfig(offset: number, width: number, _features: Features): number {
    const sectors = this.#storage.bytes / SECTOR_BYTES;
    const halves = [sectors >>> 0, Math.floor(sectors / 0x1_0000_0000)];
    const word = halves[(offset - BLK_CFG_CAPACITY) >> 2] ?? 0;
    return (word >>> (8 * (offset & 3))) & (width === 4 ? 0xffffffff : (1 << (8 * width)) - 1);
  }
  /** The whole configuration is read-only to the driver. */
  writeConfig(_offset: number, _width: number, _value: number, _features: Features): void {}

  *#serve(kicked: number): Generator<TaskYield, void, void> {
    const queue = this.#queue;
    if (queue === null) return;
    do {
      queue.disableKicks();
      for (;;) {
        const chain = queue.pop();
        if (chain === null) break;
        const { status, written, cost } = this.#request(chain);
        yield undefined;
        // A reset while we were away took the buffer back: touch nothing of it.
        if (this.#queue !== queue) return;
        // The status is the last byte: only where all before it was written, it counts as written (§ 2.7.8.2).
        const told = chain.write(chain.writableBytes - 1, Uint8Array.of(status)) === 1;
        const whole = told && written + 1 === chain.writableBytes;
        if (status !== VIRTIO_BLK_S_OK) this.counters.errors++;
        const done = this.#timeline.complete(kicked, cost);
        this.#host?.completes(done + this.#port.costs.queueRoundTripNs);
        queue.push(chain, whole ? written + 1 : written);
        queue.recycle(chain);
        this.#host?.queueInterrupt(0);
      }
      if (queue.error !== null) {
        this.#host?.needsReset(queue.error.kind);
        return;
      }
    } while (queue.enableKicks());
  }

  /** Carries one request out on the storage and into the guest's buffer; leaves the status byte to the caller. */
  #request(chain: DescriptorChain): { status: number; written: number; cost: number } {
    const { costs } = this.#port;
    const header = new Uint8Array(BLK_HEADER_BYTES);
    const fail = (status: number): { status: number; written: number; cost: number } => ({
      status,
      written: 0,
      cost: costs.exitNs,
    });
    if (chain.writableBytes === 0 || chain.read(0, header) !== BLK_HEADER_BYTES)
      return fail(VIRTIO_BLK_S_IOERR);
    const view = new DataView(header.buffer);
    const type = view.getUint32(0, true);
    const sector = view.getUint32(8, true) + view.getUint32(12, true) * 0x1_0000_0000;
    const cost = (bytes: number): number =>
      costs.diskRequestNs + Math.ceil(bytes / PAGE_SIZE) * costs.diskPageNs;
    const inside = (bytes: number): boolean =>
      bytes <= MAX_REQUEST_BYTES &&
      bytes % SECTOR_BYTES === 0 &&
      sector * SECTOR_BYTES + bytes <= this.#storage.bytes;
    switch (type) {
      case VIRTIO_BLK_T_IN: {
        const bytes = chain.writableBytes - 1;
        if (!inside(bytes)) return fail(VIRTIO_BLK_S_IOERR);
        const data = this.#buffer.subarray(0, bytes);
        if (!this.#stored(() => this.#storage.read(sector * SECTOR_BYTES, data)))
          return fail(VIRTIO_BLK_S_IOERR);
        const copied = chain.write(0, data);
        if (copied !== bytes) return { ...fail(VIRTIO_BLK_S_IOERR), written: copied };
        this.counters.reads++;
        this.counters.bytesRead += bytes;
        return { status: VIRTIO_BLK_S_OK, written: bytes, cost: cost(bytes) };
      }
      case VIRTIO_BLK_T_OUT: {
        const bytes = chain.readableBytes - BLK_HEADER_BYTES;
        if (!inside(bytes)) return fail(VIRTIO_BLK_S_IOERR);
        const data = this.#buffer.subarray(0, bytes);
        if (chain.read(BLK_HEADER_BYTES, data) !== bytes) return fail(VIRTIO_BLK_S_IOERR);
        if (!this.#stored(() => this.#storage.write(sector * SECTOR_BYTES, data)))
          return fail(VIRTIO_BLK_S_IOERR);
        this.counters.writes++;
        this.counters.bytesWritten += bytes;
        return { status: VIRTIO_BLK_S_OK, written: 0, cost: cost(bytes) };
      }
      case VIRTIO_BLK_T_FLUSH:
        if (!this.#stored(() => this.#storage.flush())) return fail(VIRTIO_BLK_S_IOERR);
        this.counters.flushes++;
        return { status: VIRTIO_BLK_S_OK, written: 0, cost: costs.diskRequestNs };
      default:
        return fail(VIRTIO_BLK_S_UNSUPP);
    }
  }

  /** Whether the storage did as asked. What it cannot do (a full host disk) is the guest's I/O error, not our end. */
  #stored(act: () => void): boolean {
    try {
      act();
      return true;
    } catch {
      return false;
    }
  }
}
