/**
 * The schedule seam. Every place where another thread's step could change the outcome announces itself here before it
 * acts. *Inline* and *free* runs ignore the announcement; a *controlled* run (`controlled-schedule.ts`) may hand over to
 * another thread at it. Points name the protocol step, not the code line.
 */
export const POINTS = [
  'start',
  'lock',
  'unlock',
  'doorbell',
  'exit',
  'index-publish',
  'ept-write',
  'flush-request',
  'flush-ack',
  'task-yield',
  'device-wait',
  /** Between translation and use. */
  'translated',
  /** A device has located guest bytes and is about to touch them. */
  'device-access',
  /** Before a frame gets or loses its owner. */
  'owner-change',
  'section',
  'load',
  'store',
  'rmw',
  /** An atomic store to a control block is visible. */
  'stored',
  'wait',
  'notify',
  'spin',
  'task-choice',
  'end',
] as const;

export type Point = (typeof POINTS)[number];

export interface Schedule {
  /** Which form this is; results carry it. */
  readonly kind: 'inline' | 'free' | 'controlled';
  /** True when `point` may hand over; hot paths test this field instead of calling. */
  readonly controlled: boolean;
  /** Announces a synchronisation point; `detail` is a frame, queue or lock number. */
  point(point: Point, detail: number): void;
  /** Which of `n` ready host tasks runs next; 0 (the longest ready) unless the run is controlled. */
  choose(n: number): number;
}

class PassThrough implements Schedule {
  readonly kind: 'inline' | 'free';
  readonly controlled = false;
  constructor(kind: 'inline' | 'free') {
    this.kind = kind;
  }
  point(_point: Point, _detail: number): void {}
  choose(_n: number): number {
    return 0;
  }
}

/** One thread; an exit pumps the host's tasks until it is served. Deterministic. */
export const inlineSchedule: Schedule = new PassThrough('inline');
/** Real workers at full speed. */
export const freeSchedule: Schedule = new PassThrough('free');
