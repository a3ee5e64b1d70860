/** The requirements of the traditional memory balloon (virtio 1.2 §5.5), over the events of one device. */
import type { DeviceEvent } from './device-events.ts';
import { ACTUAL, ACTUAL_KEPT, INFLATED, TELL_HOST, type Report } from './rules.ts';

export class BalloonChecker {
  readonly #report: Report;
  readonly #in = new Set<number>();
  /** The trace shows pages going in: only then is one that comes out without having gone in a breach. */
  #known = false;
  /** Pages by our count since the driver last told; −1: nothing to tell. */
  #untold = -1;
  #actual = -1;

  constructor(report: Report) {
    this.#report = report;
  }

  event(e: Extract<DeviceEvent, { event: 'inflate' | 'deflate' | 'actual' }>): void {
    switch (e.event) {
      case 'inflate':
        this.#known = true;
        for (const pfn of e.pfns) {
          if (this.#in.has(pfn))
            this.#report(
              TELL_HOST,
              'driver',
              `page ${pfn} is put into the balloon again without having been taken out`,
            );
          this.#in.add(pfn);
        }
        this.#untold = this.#in.size;
        break;
      case 'deflate':
        for (const pfn of e.pfns) {
          if (this.#known && !this.#in.has(pfn))
            this.#report(INFLATED, 'driver', `page ${pfn} is taken out and was not in`);
          this.#in.delete(pfn);
        }
        this.#untold = this.#in.size;
        break;
      case 'actual':
        if (e.before !== undefined && this.#actual >= 0 && e.before !== this.#actual)
          this.#report(
            ACTUAL_KEPT,
            'device',
            `actual was ${e.before}, the driver had written ${this.#actual}`,
          );
        if (this.#untold >= 0 && e.pages !== this.#untold)
          this.#report(ACTUAL, 'driver', `wrote ${e.pages}; the balloon holds ${this.#untold} pages`);
        this.#actual = e.pages;
        this.#untold = -1;
        break;
    }
  }

  /** The device was reset: what was in the balloon is the guest's again. */
  reset(): void {
    this.#in.clear();
    this.#known = false;
    this.#untold = -1;
    this.#actual = -1;
  }

  /** The host wants another size: what the driver had to tell, it should have told. */
  newTarget(mustTell: boolean): void {
    if (mustTell && this.#untold >= 0 && this.#untold !== this.#actual)
      this.#report(
        ACTUAL,
        'driver',
        `the balloon holds ${this.#untold} pages, actual still says ${this.#actual}`,
      );
  }
}
