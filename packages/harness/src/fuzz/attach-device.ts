/** Puts a device model behind virtio-mmio registers of a lab's VM. */
import { MMIO_BASE, MMIO_STRIDE } from '@ebb/guest-kernel';
import { attachVirtio, type Vm } from '@ebb/host-kvm';
import type { MmioTransport, VirtioDevice } from '@ebb/virtio/device';
import type { HostLab } from './host-lab.ts';

/** `line`: which device it is, by address and interrupt. A lease that the model breaks is a finding. */
export function attachDevice(lab: HostLab, vm: Vm, line: number, device: VirtioDevice): MmioTransport {
  return attachVirtio(vm, MMIO_BASE + line * MMIO_STRIDE, line, device, (gpa) =>
    lab.found.push(
      `device-lease: a device touched 0x${gpa.toString(16)} after it had returned the buffer (I16)`,
    ),
  );
}
