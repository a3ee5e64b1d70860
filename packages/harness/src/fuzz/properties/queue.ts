/**
 * A split queue with EVENT_IDX between a driver on a vCPU and an echo device on the host: buffers made available in batches
 * while the device works, kicks and interrupts suppressed and armed again, waits that nothing but the other side ends. Each
 * buffer comes back once, with its content; nobody waits for ever (I16, I21, I24).
 */
import { LINE_BALLOON, MMIO_BASE, MMIO_STRIDE } from '@ebb/guest-kernel';
import { QueueRunner, type DevicePort, type TaskYield } from '@ebb/host-kvm';
import { gfn, PAGE_SIZE } from '@ebb/machine';
import type { DeviceHost, SplitDeviceQueue, VirtioDevice } from '@ebb/virtio/device';
import { driverQueueWords, MmioDriver, SplitDriverQueue } from '@ebb/virtio/driver';
import { Features, VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1 } from '@ebb/virtio/uapi';
import * as fc from 'fast-check';
import { attachDevice } from '../attach-device.ts';
import type { VcpuLab } from '../vcpu-lab.ts';
import type { LabShape } from '../lab.ts';
import type { Op, Property } from '../property.ts';

const SIZE = 8;
const RINGS = { desc: 1 * PAGE_SIZE, driver: 2 * PAGE_SIZE, device: 3 * PAGE_SIZE };
/** One slot of 64 bytes per token: a word out, a word in. */
const DATA_PAGE = 4;
const DEVICE_ID = 42;

const shape: LabShape = { hostPages: 64, ramPages: 8, vms: 1, vcpus: 1, huge: 'never' };

/** Adds one to what it reads and writes it back; yields between the two, as a device with work would. */
class EchoDevice implements VirtioDevice {
  readonly deviceId = DEVICE_ID;
  readonly offered: Features = Features.of(VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1);
  readonly configBytes = 0;
  readonly queueMax: readonly number[] = [SIZE];
  readonly #runner: QueueRunner;
  #queue: SplitDeviceQueue | null = null;
  #host: DeviceHost | null = null;

  constructor(port: DevicePort) {
    this.#runner = new QueueRunner(port, 'echo', () => this.#serve());
  }
  attach(host: DeviceHost): void {
    this.#host = host;
  }
  activate(queues: readonly (SplitDeviceQueue | null)[]): void {
    this.#queue = queues[0] ?? null;
  }
  kick(index: number): void {
    this.#runner.kick(index);
  }
  get idle(): boolean {
    return this.#runner.idle;
  }
  reset(): void {
    this.#queue = null;
  }
  readConfig(): number {
    return 0;
  }
  writeConfig(): void {}

  *#serve(): Generator<TaskYield, void, void> {
    const queue = this.#queue;
    if (queue === null) return;
    const word = new Uint8Array(4);
    do {
      queue.disableKicks();
      for (let chain = queue.pop(); chain !== null; chain = queue.pop()) {
        chain.read(0, word);
        yield undefined;
        word[0]++;
        chain.write(0, word);
        queue.push(chain, 4);
        this.#host?.queueInterrupt(0);
      }
    } while (queue.enableKicks());
  }
}

class Driver {
  readonly #lab: VcpuLab;
  readonly #queue: SplitDriverQueue;
  readonly #driver: MmioDriver;
  readonly #out = new Map<number, number>();
  #sequence = 0;

  constructor(lab: VcpuLab) {
    const { vcpu } = lab;
    this.#lab = lab;
    const base = MMIO_BASE + LINE_BALLOON * MMIO_STRIDE;
    this.#driver = new MmioDriver({
      read: (offset, width) => vcpu.mmioRead(base + offset, width) >>> 0,
      write: (offset, width, value) => vcpu.mmioWrite(base + offset, width, value),
    });
    this.#queue = new SplitDriverQueue({
      size: SIZE,
      rings: RINGS,
      state: new Int32Array(driverQueueWords(SIZE)),
      stateBase: 0,
      eventIdx: true,
      indirect: false,
    });
  }

  /** The rings as they begin. */
  reset(): void {
    this.#queue.reset(this.#lab.vcpu);
  }

  one({ op, a }: Op): void {
    switch (op) {
      case 'submit':
        this.#add(1);
        break;
      case 'batch':
        this.#add(1 + (a % 3));
        break;
      case 'reap':
        this.#reap();
        break;
      case 'wait':
        if (this.#out.size > 0) this.#wait();
        break;
    }
  }

  /** Adds buffers of two segments and makes them available together. */
  #add(count: number): void {
    const { vcpu } = this.#lab;
    for (let i = 0; i < count; i++) {
      let token = 0;
      while (this.#out.has(token)) token++;
      const at = DATA_PAGE * PAGE_SIZE + token * 64;
      const value = ++this.#sequence & 0x7f;
      if (this.#queue.free < 2) break;
      vcpu.store32(gfn(DATA_PAGE), token * 16, value);
      vcpu.store32(gfn(DATA_PAGE), token * 16 + 4, 0);
      this.#queue.add(vcpu, [{ gpa: at, length: 4 }], [{ gpa: at + 16, length: 4 }], token);
      this.#out.set(token, value);
    }
    if (this.#queue.publish(vcpu)) this.#driver.kick(0);
  }

  #reap(): boolean {
    const { vcpu, found } = this.#lab;
    const token = this.#queue.popUsed(vcpu);
    if (this.#queue.broken) found.push('queue: the device returned what was not out (I21)');
    if (token < 0) return false;
    const value = this.#out.get(token);
    if (value === undefined) {
      found.push(`queue: buffer ${token} came back and was not out (I21)`);
      return true;
    }
    this.#out.delete(token);
    const echo = vcpu.load32(gfn(DATA_PAGE), token * 16 + 4);
    if (echo !== value + 1)
      found.push(`queue: buffer ${token} came back with ${echo}, not ${value + 1} (I16)`);
    return true;
  }

  /** Waits as the guest kernel's drivers do: clear the line, arm, look again, halt. */
  #wait(): void {
    const { vcpu } = this.#lab;
    for (;;) {
      const pending = vcpu.clearInterrupt(LINE_BALLOON);
      if (this.#queue.enableInterrupts(vcpu) && this.#reap()) return;
      if (this.#queue.broken) return;
      vcpu.halt(pending);
    }
  }

  /** Everything that is out comes back. */
  settle(): void {
    while (this.#out.size > 0 && !this.#queue.broken) this.#wait();
  }
}

export const queue: Property = {
  name: 'queue',
  about: 'a split queue under any interleaving of its two sides, with suppressed kicks and interrupts',
  rows: 'I16 I21 I24',
  shape,
  steps: 900,
  program: fc.record({
    host: fc.constant([]),
    cpus: fc.tuple(
      fc.array(
        fc.record({
          op: fc.constantFrom('submit', 'submit', 'batch', 'batch', 'reap', 'wait'),
          a: fc.nat({ max: 7 }),
          b: fc.constant(0),
        }),
        { minLength: 2, maxLength: 14 },
      ),
    ),
  }),
  host(lab) {
    const [{ vm }] = lab.vms;
    const port: DevicePort = {
      spawn: (n, body) => lab.spawn(n, body),
      now: () => vm.kickTime,
      costs: vm.costs,
    };
    const transport = attachDevice(lab, vm, LINE_BALLOON, new EchoDevice(port));
    // Brought up by the host itself: as register accesses of the vCPU it would be most of an execution, and no part of the
    // search.
    const driver = new MmioDriver(transport);
    const features = Features.of(VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1);
    driver.begin(DEVICE_ID);
    driver.writeFeatures(features);
    driver.acceptFeatures(features);
    driver.setupQueue(0, SIZE, RINGS);
    driver.driverOk();
    return () => [];
  },
  cpu(lab, program) {
    const driver = new Driver(lab);
    lab.schedule.quietly(() => {
      lab.vcpu.enterGuest();
      driver.reset();
    });
    for (const op of program.cpus[0]) driver.one(op);
    driver.settle();
    lab.vcpu.leaveGuest();
  },
};
