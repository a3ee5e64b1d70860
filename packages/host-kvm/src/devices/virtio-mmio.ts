/** Device models behind virtio-mmio registers (virtio 1.2 § 4.2) in a VM's address space. */
import { MmioTransport, type VirtioDevice } from '@ebb/virtio/device';
import { MMIO_REGION_BYTES } from '@ebb/virtio/uapi';
import type { MmioRegion, Vm } from '../kvm/vm.ts';

/** A transport's registers at guest-physical address `base`. */
export function virtioRegion(base: number, transport: MmioTransport): MmioRegion {
  return {
    base,
    bytes: MMIO_REGION_BYTES,
    read: (offset, width) => transport.read(offset, width),
    write: (offset, width, value) => transport.write(offset, width, value),
    mustWait: (offset, width, value) => transport.mustWait(offset, width, value),
  };
}

/** Plugs `device` in at `base`, with interrupt `line`. `onLeaseBroken`: it touched a buffer that it had returned (I16). */
export function attachVirtio(
  vm: Vm,
  base: number,
  line: number,
  device: VirtioDevice,
  onLeaseBroken: (gpa: number) => void,
): MmioTransport {
  const transport = new MmioTransport({
    device,
    memory: vm.memory,
    interrupt: () => vm.vcpus.interrupt(line),
    completed: (at) => vm.vcpus.completed(line, at),
    onLeaseBroken,
  });
  vm.addMmio(virtioRegion(base, transport));
  return transport;
}
