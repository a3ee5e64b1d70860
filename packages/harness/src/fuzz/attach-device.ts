/** Puts a device model behind virtio-mmio registers of a lab's VM. */
import { MMIO_BASE, MMIO_STRIDE } from '@ebb/guest-kernel';
import type { Vm } from '@ebb/host-kvm';
import { MmioTransport, type VirtioDevice } from '@ebb/virtio/device';
import { MMIO_REGION_BYTES } from '@ebb/virtio/uapi';
import type { HostLab } from './lab.ts';

/** `line`: which device it is, by address and interrupt. A lease that the model breaks is a finding. */
export function attachDevice(lab: HostLab, vm: Vm, line: number, device: VirtioDevice): void {
  const transport = new MmioTransport({
    device,
    memory: vm.memory,
    interrupt: () => vm.vcpus.interrupt(line),
    completed: (at) => vm.vcpus.completed(line, at),
    onLeaseBroken: (gpa) =>
      lab.found.push(
        `device-lease: a device touched 0x${gpa.toString(16)} after it had returned the buffer (I16)`,
      ),
  });
  vm.addMmio({
    base: MMIO_BASE + line * MMIO_STRIDE,
    bytes: MMIO_REGION_BYTES,
    read: (offset, width) => transport.read(offset, width),
    write: (offset, width, value) => transport.write(offset, width, value),
    mustWait: (offset, width, value) => transport.mustWait(offset, width, value),
  });
}
