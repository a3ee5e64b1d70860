/** Command lines of `ebb vm`: what is refused, in QEMU's words, and where regions go. */
import { expect, test } from 'vitest';
import { GiB } from '@ebb/machine';
import { parseCommandLine } from './command-line.ts';

test.each([
  [['-m', '1G'], ['-device', 'virtio-mem-pci,id=a,memdev=none'], /Device 'none' not found/],
  [['-m', '1G,maxmem=4G'], ['-device', 'virtio-mem-pci,id=a'], /'memdev' property is not set/],
  [['-m', 'lots'], [], /'lots' is not a size/],
  [['-smp', '99'], [], /give 1 to 8 vCPUs/],
  [['-frob', '1'], [], /-frob: unknown option/],
  [['oops'], [], /oops: not an option/],
  [['-m'], [], /-m: needs a value/],
  [['-numa', 'node,nodeid=0,cpus=0-9'], [], /CPU index \(9\) should be smaller than maxcpus/],
  [
    ['-smp', '2', '-numa', 'node,nodeid=0,cpus=0', '-numa', 'node,nodeid=1,cpus=0'],
    [],
    /CPU 0 is on another node already/,
  ],
  [['-mon', 'chardev=nope,mode=readline'], [], /chardev "nope" not found/],
  [['-m', '1G,maxmem=512M'], [], /must be at least the initial memory size/],
  [['-m', '1G,foo=bar'], [], /Property 'foo' not found/],
  [['-constructor', 'x'], [], /unknown option/],
  [['-qmp', 'unix:'], [], /give stdio or unix:PATH/],
  [['-qmp', 'stdio', '-monitor', 'stdio'], [], /cannot use stdio by multiple monitors/],
  [
    ['-m', '1G,maxmem=4G', '-object', 'memory-backend-ram,id=m,size=1G'],
    ['-device', 'virtio-mem-pci,id=a,memdev=m,unplugged-inaccessible=maybe'],
    /does not accept value 'maybe'/,
  ],
])('the command line %j %j is one clear line', (args, more, message) => {
  expect(() => parseCommandLine([...args, ...more])).toThrow(message);
});

test('a device whose figures are impossible is refused in QEMU’s words', () => {
  const backend = ['-m', '1G,maxmem=4G', '-object', 'memory-backend-ram,id=mem0,size=1G', '-device'];
  const line =
    (fields: string): (() => unknown) =>
    () =>
      parseCommandLine([...backend, `virtio-mem-pci,id=vm0,memdev=mem0${fields}`]);
  expect(line(',requested-size=3M')).toThrow(/has to be multiples of 'block-size'/);
  expect(line(',requested-size=2G')).toThrow(/cannot exceed the memory backend size/);
  expect(line(',block-size=3M')).toThrow(/power of two/);
  expect(line(',node=1')).toThrow(/exceeds the number of numa nodes: 1/);
  expect(line('')).not.toThrow();
});

test('addresses of regions follow boot memory, each by its largest size (H48)', () => {
  const place = (boot: string): number[] => {
    const regions = ['3G', '1G'].flatMap((size, i) => [
      '-object',
      `memory-backend-ram,id=mem${i},size=${size}`,
      '-device',
      `virtio-mem-pci,id=vm${i},memdev=mem${i},requested-size=256M`,
    ]);
    return parseCommandLine(['-m', `${boot},maxmem=32G`, ...regions]).devices.map((d) => d.addr);
  };
  // Boot memory that ends below 4 GiB, and 3 GiB below the hole with the rest above it.
  expect(place('1G')).toEqual([4 * GiB, 7 * GiB]);
  expect(place('6G')).toEqual([7 * GiB, 10 * GiB]);
});
