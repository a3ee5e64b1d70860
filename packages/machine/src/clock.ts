/** Virtual time. Nothing sleeps; clocks are numbers of nanoseconds that their owner advances. */

export interface Clock {
  /** Virtual nanoseconds since the run began. */
  readonly now: number;
}

/** A clock its owner moves forward; never backward. */
export class VirtualClock implements Clock {
  now = 0;

  /** Moves to `time` if that is later. */
  advanceTo(time: number): void {
    if (time > this.now) this.now = time;
  }
}
