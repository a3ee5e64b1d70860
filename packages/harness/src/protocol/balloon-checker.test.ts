/** The balloon’s requirements: pages that go in and come out, and `actual`. */
import { expect, test } from 'vitest';
import type { DeviceEvent } from './device-events.ts';
import { judge, tell } from './testing-verdicts.ts';

const must: DeviceEvent = { event: 'features', offered: [0], accepted: [0] };
const inflate: DeviceEvent = { event: 'inflate', pfns: [1, 2] };
const target: DeviceEvent = { event: 'target', pages: 9 };

test('a page taken out that was not in; actual that does not follow', () => {
  expect(
    judge(
      { event: 'inflate', pfns: [1, 2] },
      { event: 'actual', pages: 2 },
      { event: 'deflate', pfns: [2] },
      { event: 'actual', pages: 1 },
    ),
  ).toEqual([]);
  expect(judge({ event: 'inflate', pfns: [1] }, { event: 'deflate', pfns: [9] })).toEqual([
    '2 driver 5.5.6.1',
  ]);
  expect(judge({ event: 'inflate', pfns: [1, 2] }, { event: 'actual', pages: 1 })).toEqual([
    '2 driver 5.5.6.1',
  ]);
});
test('actual is due before the next target, once for each change', () => {
  expect(tell(must, inflate, target)).toEqual([
    '3 driver 5.5.6.1: the balloon holds 2 pages, actual still says -1',
  ]);
  expect(tell(must, inflate, { event: 'actual', pages: 2 }, target)).toEqual([]);
  expect(
    tell(must, inflate, { event: 'actual', pages: 2 }, { event: 'deflate', pfns: [1, 2] }, target),
  ).toEqual(['5 driver 5.5.6.1: the balloon holds 0 pages, actual still says 2']);
});
test('actual may be written without a change; what is read back is what was written, 0 too', () => {
  expect(tell(inflate, { event: 'actual', pages: 2 }, { event: 'actual', pages: 2, before: 2 })).toEqual([]);
  expect(tell({ event: 'actual', pages: 0 }, { event: 'actual', pages: 0, before: 3 })).toEqual([
    '2 device 2.5.2: actual was 3, the driver had written 0',
  ]);
});
test('an empty balloon is told as any other', () => {
  expect(
    tell(
      inflate,
      { event: 'actual', pages: 2 },
      { event: 'deflate', pfns: [1, 2] },
      { event: 'actual', pages: 1 },
    ),
  ).toEqual(['4 driver 5.5.6.1: wrote 1; the balloon holds 0 pages']);
});
