/**
 * The schedule seam. Every place where another thread's step could change the outcome announces itself here before it
 * acts. *Inline* and *free* runs ignore the announcement; a *controlled* run (its own issue) hands over to another
 * thread at it. Points name the protocol step, not the code line.
 */
export type Point =
  | 'lock'
  | 'unlock'
  | 'doorbell'
  | 'exit'
  | 'index-publish'
  | 'ept-write'
  | 'flush-request'
  | 'flush-ack'
  | 'task-yield'
  | 'device-wait'
  | 'translated'
  | 'owner-change'
  | 'section';

export interface Schedule {
  /** Which form this is; results carry it. */
  readonly kind: 'inline' | 'free';
  /** True when `point` may hand over; hot paths test this field instead of calling. */
  readonly controlled: boolean;
  /** Announces a synchronisation point; `detail` is a frame, queue or lock number. */
  point(point: Point, detail: number): void;
}

class PassThrough implements Schedule {
  readonly kind: 'inline' | 'free';
  readonly controlled = false;
  constructor(kind: 'inline' | 'free') {
    this.kind = kind;
  }
  point(_point: Point, _detail: number): void {}
}

/** One thread; an exit pumps the host's tasks until it is served. Deterministic. */
export const inlineSchedule: Schedule = new PassThrough('inline');
/** Real workers at full speed. */
export const freeSchedule: Schedule = new PassThrough('free');
