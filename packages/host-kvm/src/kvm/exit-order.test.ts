/** Which exits the host answers in the scan that finds them, and which become the work of a task. */
import { expect, test } from 'vitest';
import { EXIT_DONE, EXIT_MMIO_READ, EXIT_REQUEST, VC_EXIT_STATE, VCPU_BLOCK_WORDS } from '@ebb/machine';
import { postExit, testHost, type TestHost } from './testing-host.ts';

const REGISTERS = 0xfe_0000_0000;

/** The first vCPU writes a register while the second one reads where nobody is: their mailboxes after one scan, and after all. */
function bothAsk(write: (host: TestHost) => void): readonly (readonly number[])[] {
  const host = testHost({ vcpus: 2 });
  host.vm.addMmio({ base: REGISTERS, bytes: 4096, read: () => 0, write: () => write(host) });
  const [vcpu] = host.vcpus;
  const states: number[][] = [];
  const { port } = vcpu;
  const call = port.call.bind(port);
  port.call = (control, base) => {
    const other = base + VCPU_BLOCK_WORDS;
    postExit(control, other, EXIT_MMIO_READ, REGISTERS + 8192, 4);
    const now = (): number[] => [control[base + VC_EXIT_STATE], control[other + VC_EXIT_STATE]];
    host.vm.scanExits();
    states.push(now());
    while (host.poll());
    states.push(now());
    call(control, base);
  };
  vcpu.enterGuest();
  vcpu.mmioWrite(REGISTERS, 4, 1);
  return states;
}

test('two vCPUs that ask at once are answered in the scan that finds them', () => {
  expect(bothAsk(() => undefined)).toEqual([
    [EXIT_DONE, EXIT_DONE],
    [EXIT_DONE, EXIT_DONE],
  ]);
});

test('an answer that gives a device’s task work to do makes the next exit one of the tasks that take turns', () => {
  const wrote: string[] = [];
  const device = (host: TestHost): void => {
    host.tasks.spawn(
      'queue',
      (function* () {
        wrote.push('the device');
        yield undefined;
      })(),
    );
  };
  expect(bothAsk(device)).toEqual([
    [EXIT_DONE, EXIT_REQUEST],
    [EXIT_DONE, EXIT_DONE],
  ]);
  expect(wrote).toEqual(['the device']);
});
