/** Seeded faults. Virtqueues. */
import { fault, props, test, type Mutant } from '../mutant.ts';

const BLOCK_DEVICE = 'packages/host-kvm/src/devices/block.ts';
const DRIVER_QUEUE = 'packages/virtio/src/driver/split-driver-queue.ts';
const DEVICE_QUEUE = 'packages/virtio/src/device/split-device-queue.ts';
const TRANSPORT = 'packages/virtio/src/device/mmio-transport.ts';
const BAD_RINGS = test('virtio/src/conformance/bad-rings.test.ts');

export const QUEUES_FAULTS: readonly Mutant[] = [
  fault(
    'avail-before-desc',
    DRIVER_QUEUE,
    '    const head = s[this.#base + S_FREE_HEAD];\n    let index = head;\n',
    '    const head = s[this.#base + S_FREE_HEAD];\n    let index = head;\n    this.#pushAvail(memory, head);\n    this.publish(memory);\n    s[this.#base + S_AVAIL] = (s[this.#base + S_AVAIL] + 0xffff) & 0xffff;\n',
    'I21: published before it is written',
    props('queue'),
  ),
  fault(
    'event-dekker-driver',
    DRIVER_QUEUE,
    '    Atomics.store(memory.u16, (memory.at + AVAIL_IDX) >> 1, idx);\n    s[this.#base + S_PUBLISHED] = idx;\n    return this.needsKick(memory);',
    '    s[this.#base + S_PUBLISHED] = idx;\n    const kick = this.needsKick(memory);\n    this.#window(memory, this.rings.driver, availBytes(this.size));\n    Atomics.store(memory.u16, (memory.at + AVAIL_IDX) >> 1, idx);\n    return kick;',
    'I24: the event is read before the index is stored',
    props('queue'),
  ),
  fault(
    'device-no-recheck',
    DEVICE_QUEUE,
    '    return this.hasAvail();\n',
    '    return false;\n',
    'I24: kicks armed without another look',
    props('queue'),
  ),
  fault(
    'driver-no-recheck',
    DRIVER_QUEUE,
    '    return this.hasUsed(memory);\n',
    '    return false;\n',
    'I24: interrupts armed without another look',
    props('queue'),
  ),
  fault(
    'need-event-wrap',
    'packages/virtio/src/uapi/virtio.ts',
    'return ((newIndex - event - 1) & 0xffff) < ((newIndex - oldIndex) & 0xffff);',
    'return newIndex - event - 1 < newIndex - oldIndex && event < newIndex;',
    'I21: event comparison breaks at the wrap',
    test('virtio/'),
  ),
  fault(
    'chain-unbounded',
    DEVICE_QUEUE,
    'if (count >= limit || chain.segments >= size) {',
    'if (count >= 1_000_000) {',
    'hang bound: a descriptor loop',
    BAD_RINGS,
  ),
  fault(
    'nested-indirect',
    DEVICE_QUEUE,
    "    if (nested) return { kind: 'indirect-nested' };\n",
    '',
    'malformed: indirect inside indirect',
    BAD_RINGS,
  ),
  fault(
    'next-unchecked',
    DEVICE_QUEUE,
    '        if (index < limit) continue;\n',
    '        if (index < 65536) continue;\n',
    'malformed: next beyond the table',
    BAD_RINGS,
  ),
  fault(
    'head-unchecked',
    DEVICE_QUEUE,
    "    if (head >= this.size) return this.#fail({ kind: 'head-out-of-range', head });\n",
    '',
    'malformed: a head beyond the queue',
    BAD_RINGS,
  ),
  fault(
    'index-jump-believed',
    DEVICE_QUEUE,
    '    if (n > this.size) {\n',
    '    if (n > 65536) {\n',
    'malformed: the index jumps',
    BAD_RINGS,
  ),
  fault(
    'zero-length-taken',
    DEVICE_QUEUE,
    "    if (length === 0) return { kind: 'zero-length', gpa };\n",
    '',
    'malformed: zero length',
    BAD_RINGS,
  ),
  fault(
    'order-of-segments',
    DEVICE_QUEUE,
    "    if (!writable && chain.writableSegments > 0) return { kind: 'readable-after-writable', index };\n",
    '',
    'malformed: readable after writable',
    BAD_RINGS,
  ),
  fault(
    'used-id-believed',
    DRIVER_QUEUE,
    '    if (head < 0 || head >= this.size || s[this.#token + head] < 0) {\n',
    '    if (head < 0 || head >= this.size) {\n',
    'a device returns what is not out',
    test('virtio/'),
  ),
  fault(
    'dma-after-push',
    BLOCK_DEVICE,
    '        queue.recycle(chain);\n        this.#host?.queueInterrupt(0);\n',
    '        chain.write(0, new Uint8Array(1));\n        queue.recycle(chain);\n        this.#host?.queueInterrupt(0);\n',
    'I16: bytes touched after the buffer was returned',
    props('cache'),
  ),
  fault(
    'reset-keeps-status',
    TRANSPORT,
    '    this.#interruptStatus = 0;\n',
    '',
    'a reset leaves an interrupt pending',
    test('virtio/src/conformance/mmio.test.ts'),
  ),
];
