/** A region whose memory slots come and go with what is plugged: where nothing is, the VM has no memory at all. */
import { expect, test } from 'vitest';
import { COST_TABLE, gfn, MiB, PAGE_SIZE } from '@ebb/machine';
import { MemFile } from '@ebb/memfs';
import { VIRTIO_MEM_REQ_PLUG, VIRTIO_MEM_REQ_UNPLUG, VIRTIO_MEM_RESP_ACK } from '@ebb/virtio/uapi';
import { testHost, type TestHost } from '../kvm/testing-host.ts';
import { MemoryDevice } from './memory-device.ts';
import { RegionSlots } from './region.ts';
import { memoryGuest } from './testing-memory-device.ts';

const REGION = 32 * MiB;
const BASE: number = REGION / PAGE_SIZE;
const BLOCK_PAGES: number = MiB / PAGE_SIZE;

interface World {
  readonly host: TestHost;
  readonly device: MemoryDevice;
  readonly file: MemFile;
  /** Blocks from `first` on; each is acknowledged. */
  plug(first: number, count: number): void;
  unplug(first: number, count: number): void;
}

/** 16 blocks of 1 MiB, four to a slot; none plugged. */
function world(): World {
  const host = testHost({ ramBytes: 16 * MiB, huge: 'never' });
  const file = new MemFile({ name: 'vm0/vm0', nrBlocks: 4096, vm: 0, frames: host.pool, huge: 'never' });
  const slots = new RegionSlots({
    vm: host.vm,
    file,
    firstSlot: 8,
    baseGfn: BASE,
    nrPages: 4096,
    slotPages: 4 * BLOCK_PAGES,
  });
  const device = new MemoryDevice({
    port: { spawn: (name, body) => void host.tasks.spawn(name, body), now: () => 0, costs: COST_TABLE },
    region: slots,
    id: 'vm0',
    addr: REGION,
    regionBytes: 16 * MiB,
    blockBytes: MiB,
    node: 0,
    requestedBytes: 16 * MiB,
    profile: 'inaccessible',
  });
  host.vm.addGate(device.unplugged);
  const guest = memoryGuest(device, host.vm.memory, () => {
    while (host.poll());
  });
  const send = (type: number, first: number, count: number): void => {
    expect(guest.request(type, REGION + first * MiB, count).type).toBe(VIRTIO_MEM_RESP_ACK);
  };
  return {
    host,
    device,
    file,
    plug: (first, count) => send(VIRTIO_MEM_REQ_PLUG, first, count),
    unplug: (first, count) => send(VIRTIO_MEM_REQ_UNPLUG, first, count),
  };
}

/** Slots of the region as KVM has them: number and first page from the region's start. */
const there = ({ host }: World): number[][] =>
  host.vm.slots.all.filter((s) => s.id >= 8).map((s) => [s.id, s.baseGfn - BASE]);

function store(w: World, block: number, value: number): number {
  const [vcpu] = w.host.vcpus;
  const page = gfn(BASE + block * BLOCK_PAGES);
  vcpu.enterGuest();
  vcpu.store32(page, 3, value);
  const found = vcpu.load32(page, 3);
  vcpu.leaveGuest();
  return found;
}

test('a slot comes with the first block that is plugged in it and goes with the last', () => {
  const w = world();
  const { host } = w;
  expect(there(w)).toEqual([]);
  w.plug(3, 2);
  expect(there(w)).toEqual([
    [8, 0],
    [9, 4 * BLOCK_PAGES],
  ]);
  const { generation } = host.vm.slots;
  w.unplug(3, 1);
  expect(there(w)).toEqual([[9, 4 * BLOCK_PAGES]]);
  // A cached "this is no MMIO" is stale.
  expect(host.vm.slots.generation).toBeGreaterThan(generation);
  w.plug(5, 1);
  w.unplug(4, 1);
  expect(there(w)).toEqual([[9, 4 * BLOCK_PAGES]]);
});

test('memory where a slot is, nothing where none is, and no frame stays behind what goes', () => {
  const w = world();
  const { host, device, file } = w;
  w.plug(0, 1);
  expect([store(w, 0, 7), store(w, 1, 7), store(w, 4, 7)]).toEqual([7, -1, -1]);
  expect(file.assigned).toBe(1);
  // Block 1 is refused by its verdict, block 4 has no slot at all.
  expect([device.counters.refusedWrites, device.counters.refusedReads]).toEqual([1, 1]);
  w.unplug(0, 1);
  expect([store(w, 0, 8), file.assigned, host.log.total]).toEqual([-1, 0, 0]);
});

test('a system reset leaves no slot, or those of what stays', () => {
  const w = world();
  const { host, device, file } = w;
  const plug = (): void => {
    w.plug(1, 1);
    w.plug(9, 2);
    store(w, 9, 5);
  };
  plug();
  host.finish(device.systemReset('hyper-v'));
  expect([there(w).map(([id]) => id), file.assigned]).toEqual([[8, 10], 0]);
  host.finish(device.systemReset('rfc-2017'));
  expect(there(w).map(([id]) => id)).toEqual([8]);
  device.setRequested(16 * MiB);
  host.finish(device.systemReset('virtio-1.2'));
  expect([there(w), file.assigned]).toEqual([[], 0]);
  plug();
  expect(there(w).map(([id]) => id)).toEqual([8, 10]);
});
