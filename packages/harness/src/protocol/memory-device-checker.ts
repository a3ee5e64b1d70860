/** The requirements of the memory device (virtio 1.2 §5.15), over the events of one device. */
import type { DeviceEvent } from './device-events.ts';
import {
  MEM_CONFIG,
  MEM_CONFIG_WRITE,
  MEM_ERROR,
  MEM_RANGE,
  MEM_RESPONSE,
  MEM_SHRINK,
  MEM_UNPLUG_ERROR,
  type Report,
} from './rules.ts';

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
export class MemoryDeviceChecker {
  readonly #report: Report;
  readonly #plugged = new Set<number>();
  #block = 0;
  readonly #guessedBlock: number;
  #request: Extract<DeviceEvent, { event: 'plug' | 'unplug' | 'unplug-all' | 'state' }> | null = null;
  #region: { addr: number; usable: number } | null = null;
  /** Until the first request, and after a device unplugged all by itself: the usable region may shrink. */
  #resetting = true;

  /** `guessedBlock`: bytes of a block where the trace does not show the configuration. */
  constructor(report: Report, guessedBlock: number) {
    this.#report = report;
    this.#guessedBlock = guessedBlock;
  }

  configWrite(e: Extract<DeviceEvent, { event: 'config-write' }>): void {
    if (this.#block > 0) this.#report(MEM_CONFIG_WRITE, 'driver', `wrote ${e.value} at offset ${e.offset}`);
  }

  /** The device was reset: what it was asked it will not answer. Memory stays as it is plugged. */
  reset(): void {
    this.#request = null;
  }

  event(e: MemEvent): void {
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
