/**
 * Scenarios of `ebb run`: small runs that drive one mechanism end to end through guest loads and stores, rings and EPT,
 * in real threads or inline, and say what they saw. Each ends in checks; a failed check is exit code 1.
 */
import { ANY_MEMORY_SCENARIOS } from './any-memory.ts';
import { BALLOON_SCENARIOS } from './balloon.ts';
import { DIMM_SCENARIOS } from './dimms.ts';
import { HOST_MEMORY_SCENARIOS } from './host-memory.ts';
import { MEMORY_DEVICE_SCENARIOS } from './memory-device.ts';
import { MEMORY_DEVICE_VARIANTS } from './memory-device-variants.ts';
import { PRESSURE } from './pressure.ts';
import { REBOOT_SCENARIOS } from './reboot-elsewhere.ts';
import type { Scenario } from './scenario.ts';
import { UNPLUGGED_MEMORY_SCENARIOS } from './unplugged-memory.ts';

export const SCENARIOS: readonly Scenario[] = [
  PRESSURE,
  ...BALLOON_SCENARIOS,
  ...HOST_MEMORY_SCENARIOS,
  ...MEMORY_DEVICE_SCENARIOS,
  ...MEMORY_DEVICE_VARIANTS,
  ...ANY_MEMORY_SCENARIOS,
  ...REBOOT_SCENARIOS,
  ...UNPLUGGED_MEMORY_SCENARIOS,
  ...DIMM_SCENARIOS,
];
