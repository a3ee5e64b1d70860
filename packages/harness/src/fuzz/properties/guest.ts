/**
 * A whole guest kernel on two vCPUs: allocation, page cache, balloon, hinting and reporting against devices that discard.
 * The guest's own shadow and stamps check each page, the audit its books; a model of the files checks the disk.
 */
import {
  VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
  VIRTIO_BALLOON_F_FREE_PAGE_HINT,
  VIRTIO_BALLOON_F_MUST_TELL_HOST,
  VIRTIO_BALLOON_F_REPORTING,
  VIRTIO_BALLOON_F_STATS_VQ,
} from '@ebb/virtio/uapi';
import * as fc from 'fast-check';
import type { LabShape } from '../lab.ts';
import type { FuzzProgram, Op, Property } from '../property.ts';
import { guestHost } from './guest-host.ts';
import { PAGES, pagesOf, REGION_PAGES, type GuestKind } from './guest-model.ts';
import { runGuest } from './guest-run.ts';

function programs(kind: GuestKind, vcpus: number): fc.Arbitrary<FuzzProgram> {
  const op = (names: readonly string[]): fc.Arbitrary<Op> =>
    fc.record({ op: fc.constantFrom(...names), a: fc.nat({ max: 63 }), b: fc.nat({ max: 15 }) });
  return fc.record({
    host: kind.host.length === 0 ? fc.constant([]) : fc.array(op(kind.host), { minLength: 1, maxLength: 5 }),
    cpus: fc.tuple(
      ...Array.from({ length: vcpus }, () => fc.array(op(kind.cpu), { minLength: 2, maxLength: 16 })),
    ),
  });
}

function guestProperty(
  name: string,
  about: string,
  rows: string,
  kind: GuestKind,
  hostPages: number = PAGES + 128,
): Property {
  const shape: LabShape = { hostPages, ramPages: pagesOf(kind), vms: 1, vcpus: 2, huge: 'never' };
  return {
    name,
    about,
    rows,
    shape,
    steps: 9000,
    program: programs(kind, shape.vcpus),
    host: (lab, program) => guestHost(kind, lab, program),
    cpu: (lab, program, _vm, id) => runGuest(kind, lab, program.cpus[id], id),
  };
}

const MEMORY_OPS = [
  'alloc',
  'alloc',
  'free',
  'free',
  'verify',
  'many',
  'free-many',
  'time',
  'slice',
  'starve',
];

export const allocator: Property = guestProperty(
  'allocator',
  'two vCPUs allocate and free through per-CPU lists and the buddy',
  'I19 I2',
  {
    features: null,
    disk: false,
    reportingOrder: 9,
    cpu: [...MEMORY_OPS, 'drain', 'drain', 'drain', 'slice'],
    host: [],
  },
);

export const reporting: Property = guestProperty(
  'reporting',
  'free page reporting beside allocation: nothing reported is handed out before the host has answered',
  'I3 I15 L25 L28',
  {
    features: [VIRTIO_BALLOON_F_REPORTING],
    disk: false,
    reportingOrder: 3,
    cpu: [...MEMORY_OPS, 'time', 'time'],
    host: ['interrupt', 'target'],
  },
);

export const balloon: Property = guestProperty(
  'balloon',
  'inflate, deflate, hinting and statistics beside allocation, with MUST_TELL_HOST',
  'I3b I5 I15 I24',
  {
    features: [
      VIRTIO_BALLOON_F_MUST_TELL_HOST,
      VIRTIO_BALLOON_F_STATS_VQ,
      VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
      VIRTIO_BALLOON_F_FREE_PAGE_HINT,
    ],
    disk: false,
    reportingOrder: 9,
    cpu: [...MEMORY_OPS, 'rebind'],
    host: ['target', 'target', 'stats', 'hint', 'interrupt'],
  },
);

export const cache: Property = guestProperty(
  'cache',
  'page cache, write-back and reclaim on two vCPUs against a model disk',
  'I19 I16 G-cache',
  {
    features: null,
    disk: true,
    reportingOrder: 9,
    cpu: [
      'write',
      'write',
      'write',
      'read',
      'peek',
      'peek',
      'drop',
      'drop',
      'drop',
      'sync',
      'sync',
      'sync',
      'many',
      'free-many',
      'time',
      'slice',
      'starve',
    ],
    host: ['interrupt'],
  },
);

const REGION_CPU_OPS = [...MEMORY_OPS, 'drain'];

export const memoryDevice: Property = guestProperty(
  'memory-device',
  'a host that resizes a region while two vCPUs allocate from it: plug, unplug, isolation and busy answers',
  'I9 I15 I20 I24 H5-H8 H16',
  {
    features: null,
    disk: false,
    memory: 'rfc-write-protect',
    reportingOrder: 9,
    cpu: REGION_CPU_OPS,
    host: ['resize', 'resize', 'resize', 'busy', 'interrupt'],
  },
  PAGES + REGION_PAGES + 128,
);

export const migration: Property = guestProperty(
  'migration',
  'cached pages move out of a region that shrinks, while both vCPUs read and write their files',
  'I15 I20 I22 H16',
  {
    features: null,
    disk: true,
    memory: 'qemu',
    reportingOrder: 9,
    cpu: ['write', 'write', 'read', 'read', 'peek', 'peek', 'drop', 'sync', 'time', 'slice', 'starve'],
    host: ['resize', 'resize', 'resize', 'resize', 'interrupt'],
  },
  PAGES + REGION_PAGES + 128,
);

export const processes: Property = guestProperty(
  'processes',
  'processes store, fork, share and exit on two vCPUs while their pages move out of a region that shrinks',
  'I15 I20 I22 H16 H24',
  {
    features: null,
    disk: false,
    memory: 'qemu',
    processes: true,
    reportingOrder: 9,
    cpu: ['store', 'store', 'hammer', 'hammer', 'load', 'load', 'discard', 'fork', 'exit', 'slice', 'starve'],
    host: ['resize', 'resize', 'resize', 'resize'],
  },
  PAGES + REGION_PAGES + 128,
);
