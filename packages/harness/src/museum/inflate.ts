/** Sends one inflate buffer to a balloon device of a small machine, as a driver would, and waits for it. */
import type { BalloonDevice } from '@ebb/host-kvm';
import { FlatGuestMemory } from '@ebb/machine';
import { MmioTransport, type VirtioDevice } from '@ebb/virtio/device';
import { driverQueueWords, MmioDriver, SplitDriverQueue } from '@ebb/virtio/driver';
import { Features, VIRTIO_F_VERSION_1, VIRTIO_ID_BALLOON } from '@ebb/virtio/uapi';
import type { SmallMachine } from '../run/small-machine.ts';

const RINGS = { desc: 0x1000, driver: 0x2000, device: 0x3000 };
const PFNS = 0x4000;

/** The device, but for the reset that every bring-up begins with: an exhibit resets when its story does. */
function withoutReset(device: BalloonDevice): VirtioDevice {
  return {
    deviceId: device.deviceId,
    offered: device.offered,
    configBytes: device.configBytes,
    queueMax: device.queueMax,
    attach: (host) => device.attach(host),
    activate: (queues, features) => device.activate(queues, features),
    kick: (index) => device.kick(index),
    get idle() {
      return device.idle;
    },
    reset: () => undefined,
    readConfig: (offset, width, features) => device.readConfig(offset, width, features),
    writeConfig: (offset, width, value, features) => device.writeConfig(offset, width, value, features),
  };
}

/** Rings and PFNs are in memory of their own, so that the exhibit's pages are the guest's alone. */
export function inflate(m: SmallMachine, device: BalloonDevice, pfns: readonly number[]): void {
  const memory = new FlatGuestMemory(new SharedArrayBuffer(0x8000));
  const transport = new MmioTransport({ device: withoutReset(device), memory, interrupt: () => undefined });
  const driver = new MmioDriver({
    read: (offset, width) => transport.read(offset, width),
    write: (offset, width, value) => transport.write(offset, width, value),
  });
  driver.begin(VIRTIO_ID_BALLOON);
  const features = Features.of(VIRTIO_F_VERSION_1);
  driver.writeFeatures(features);
  driver.acceptFeatures(features);
  const queue = new SplitDriverQueue({
    size: 64,
    rings: RINGS,
    state: new Int32Array(driverQueueWords(64)),
    stateBase: 0,
    eventIdx: false,
    indirect: false,
  });
  queue.reset(memory);
  driver.setupQueue(0, 64, RINGS);
  driver.driverOk();
  memory.window(PFNS, pfns.length * 4, true);
  memory.i32.set(pfns, memory.at >> 2);
  queue.add(memory, [{ gpa: PFNS, length: pfns.length * 4 }], [], 1);
  queue.publish(memory);
  driver.kick(0);
  for (let i = 0; i < 10_000 && queue.popUsed(memory) < 0; i++) m.poll();
}
