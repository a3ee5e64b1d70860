/**
 * The host's doorbell: an Int32 word that anyone adds to and the host waits on.
 *
 * Lost wake-ups are excluded by a Dekker pair: the ringer adds, *then* loads `asleep`; the host captures the count,
 * stores `asleep`, *then* scans for work once more, and waits only for the captured count.
 */
import * as layout from './layout.ts';

// Local copies: docs/performance.md § Constants.
const { RC_DOORBELL, RC_HOST_ASLEEP } = layout;

/** Rings: work was published before this call. Pairs with the scan after `asleep` is set in the host's loop. */
export function ringDoorbell(runControl: Int32Array): void {
  Atomics.add(runControl, RC_DOORBELL, 1);
  if (Atomics.load(runControl, RC_HOST_ASLEEP) !== 0) Atomics.notify(runControl, RC_DOORBELL);
}

/** Wakes the host only if it sleeps: for state it can poll itself, such as flush acknowledgements. */
export function nudgeSleepingHost(runControl: Int32Array): void {
  if (Atomics.load(runControl, RC_HOST_ASLEEP) !== 0) {
    Atomics.add(runControl, RC_DOORBELL, 1);
    Atomics.notify(runControl, RC_DOORBELL);
  }
}
