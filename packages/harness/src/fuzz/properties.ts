/** The properties, by name. */
import {
  allocator,
  balloon,
  cache,
  memoryDevice,
  migration,
  processes,
  reporting,
} from './properties/guest.ts';
import { hostileMemory } from './properties/hostile-memory.ts';
import { hostile } from './properties/hostile.ts';
import { invalidation, isolation, slots } from './properties/memory.ts';
import { queue } from './properties/queue.ts';
import { UserError } from '../trace/trace.ts';
import type { Property } from './property.ts';

export const PROPERTIES: readonly Property[] = [
  invalidation,
  isolation,
  slots,
  allocator,
  reporting,
  balloon,
  cache,
  memoryDevice,
  migration,
  processes,
  queue,
  hostile,
  hostileMemory,
];

export function findProperty(name: string): Property {
  const property = PROPERTIES.find((p) => p.name === name);
  if (property === undefined)
    throw new UserError(`${name}: no such property; use one of ${PROPERTIES.map((p) => p.name).join(', ')}`);
  return property;
}
