/**
 * Events of the monitors, rate-limited as QEMU does (`monitor_qapi_event_conf`): of each event and device one is sent at
 * once, the newest of those that follow when a second has passed.
 */
import { NS_PER_S } from '@ebb/machine';
import { line } from './qmp.ts';

export type MonitorEvent =
  | {
      readonly event: 'MEMORY_DEVICE_SIZE_CHANGE';
      readonly data: { id: string; size: number; 'qom-path': string };
    }
  | { readonly event: 'DEVICE_DELETED'; readonly data: { device: string; path: string } }
  | {
      readonly event: 'ACPI_DEVICE_OST';
      readonly data: {
        info: { device: string; source: number; status: number; slot: string; 'slot-type': 'DIMM' };
      };
    }
  | { readonly event: 'BALLOON_CHANGE'; readonly data: { actual: number } }
  | { readonly event: 'RESET'; readonly data: { guest: boolean; reason: string } }
  | { readonly event: 'STOP' | 'RESUME' }
  | { readonly event: 'SHUTDOWN'; readonly data: { guest: boolean; reason: string } };

const RATE_NS = NS_PER_S;

interface Limited {
  /** When the last was sent, virtual. */
  sentAt: number;
  pending: MonitorEvent | null;
}

export class MonitorEvents {
  readonly #send: (text: string) => void;
  readonly #wallClockMs: () => number;
  readonly #limited = new Map<string, Limited>();

  /** `send`: to every connection that has negotiated. `wallClockMs`: for time stamps. */
  constructor(send: (text: string) => void, wallClockMs: () => number) {
    this.#send = send;
    this.#wallClockMs = wallClockMs;
  }

  /** Something happened at virtual time `now`. */
  emit(event: MonitorEvent, now: number): void {
    const key = limitKey(event);
    if (key === null) {
      this.#write(event);
      return;
    }
    const limited = this.#limited.get(key) ?? { sentAt: Number.NEGATIVE_INFINITY, pending: null };
    this.#limited.set(key, limited);
    if (now - limited.sentAt < RATE_NS) {
      limited.pending = event;
      return;
    }
    limited.sentAt = now;
    this.#write(event);
  }

  /** Sends what has waited its second. */
  flush(now: number): void {
    for (const limited of this.#limited.values()) {
      if (limited.pending === null || now - limited.sentAt < RATE_NS) continue;
      this.#write(limited.pending);
      limited.pending = null;
      limited.sentAt = now;
    }
  }

  /** Virtual time at which something is waiting to be sent; Infinity if nothing is. */
  nextDue(): number {
    let due = Number.POSITIVE_INFINITY;
    for (const { pending, sentAt } of this.#limited.values())
      if (pending !== null) due = Math.min(due, sentAt + RATE_NS);
    return due;
  }

  #write(event: MonitorEvent): void {
    const ms = this.#wallClockMs();
    const timestamp = { seconds: Math.floor(ms / 1000), microseconds: Math.floor((ms % 1000) * 1000) };
    this.#send(line({ timestamp, ...event }));
  }
}

function limitKey(event: MonitorEvent): string | null {
  if (event.event === 'MEMORY_DEVICE_SIZE_CHANGE') return `${event.event} ${event.data.id}`;
  return event.event === 'BALLOON_CHANGE' ? event.event : null;
}
