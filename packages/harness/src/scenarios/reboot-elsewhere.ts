/** What a reboot leaves a guest with elsewhere: Hyper-V's hot-added memory and Xen's balloon, beside virtio-mem (H60). */
import { H_TOTAL_PAGES } from '@ebb/guest-kernel';
import { GiB, MiB, PAGE_SIZE } from '@ebb/machine';
import { device, hotplugGuest, REGION_ADDR } from './hotplug-guest.ts';
import { atLeast, clean, exactly, freshGuest, holds, second, spec, type Scenario } from './scenario.ts';

const BOOT: number = 256 * MiB;
const PLUGGED: number = 512 * MiB;
/** What a Xen domain has when its balloon is in: half of the RAM that its firmware tells of, and a little. */
const XEN_RAM: number = 512 * MiB;
const XEN_TARGET: number = 256 * MiB;
const XEN_LIMIT: number = XEN_TARGET + 16 * MiB;

export const REBOOT_SCENARIOS: readonly Scenario[] = [
  {
    name: 'reboot-hyper-v',
    about:
      'memory that was added stays where it is over a system reset: a kernel without the driver is told of it, and uses it for good',
    rows: 'H3, H19, H60; I10',
    spec: () => {
      const first = hotplugGuest(BOOT, [device()]);
      const boot = freshGuest(BOOT);
      const region = { start: REGION_ADDR / PAGE_SIZE, end: (REGION_ADDR + PLUGGED) / PAGE_SIZE };
      // The firmware's map names what is plugged; the kernel has no driver for it.
      const after = {
        ...boot,
        e820: [...boot.e820, region],
        nodes: [{ start: 0, end: region.end }],
        maxPfn: first.maxPfn,
      };
      const vm = (policy: 'hyper-v' | 'virtio-1.2') => ({
        bootAtNs: 0,
        guest: first,
        guestAfterReset: policy === 'hyper-v' ? after : { ...boot, maxPfn: first.maxPfn },
        // More than boot memory, where there is more.
        program: holds(policy === 'hyper-v' ? 40_000 : 8192, second(4), 0),
        memoryDevices: [device()],
        memoryTargets: [[second(0), 0, PLUGGED]] as const,
        resets: [[second(3), policy]] as const,
        diskBytes: 0,
      });
      return spec(2 * GiB, [vm('hyper-v'), vm('virtio-1.2')]);
    },
    checks: (outcome) => {
      const [hyperV, upstream] = outcome.result.vms.map((vm) => vm.memoryDevices[0]);
      const totals = outcome.arenas.map((arena) => arena.w[H_TOTAL_PAGES] * PAGE_SIZE);
      return [
        ...clean(outcome),
        exactly('hyper-v: bytes plugged, for a kernel without the driver', hyperV.plugged, PLUGGED),
        // Less the memmap, which is one piece up to the end of the region.
        atLeast('hyper-v: memory of that kernel', totals[0], BOOT + PLUGGED - 128 * MiB),
        atLeast('hyper-v: host bytes behind it that nobody can ask for', hyperV.host, 32 * MiB),
        exactly('virtio-1.2: bytes plugged', upstream.plugged, 0),
        { what: 'virtio-1.2: memory of such a kernel', value: totals[1], ok: totals[1] < BOOT },
      ];
    },
  },
  {
    name: 'reboot-xen',
    about:
      'a ballooned domain reboots into a kernel without the driver: it is told of more than it may have, touches it, and is killed',
    rows: 'H60; I9',
    spec: () =>
      spec(1 * GiB, [
        {
          bootAtNs: 0,
          guest: freshGuest(XEN_RAM, { balloon: true }),
          guestAfterReset: freshGuest(XEN_RAM),
          balloonFeatures: [],
          balloonTargets: [[second(0), XEN_TARGET]],
          populateLimit: XEN_LIMIT / PAGE_SIZE,
          resets: [[second(3), 'virtio-1.2']],
          // After the reset: what a kernel that sees 512 MiB may well use.
          program: holds(45_000, second(4), 0),
          diskBytes: 0,
        },
      ]),
    checks: (outcome) => {
      const [vm] = outcome.result.vms;
      const [arena] = outcome.arenas;
      return [
        exactly('ledger violations', outcome.result.ledgerViolations, 0),
        atLeast('memory that the second kernel sees', arena.w[H_TOTAL_PAGES] * PAGE_SIZE, XEN_RAM - 32 * MiB),
        { what: 'the VM, once it touches more than it may have', value: vm.state, ok: vm.state === 'killed' },
        { what: 'the run says so', value: outcome.result.why, ok: outcome.result.why.startsWith('VM 0: ') },
      ];
    },
  },
];
