/** What we use of the package `qemu-qmp`, a QMP client without types of its own. */
declare module 'qemu-qmp' {
  import type { EventEmitter } from 'node:events';

  /** A socket; events of the VM are emitted by their names in lower case. */
  export default class Qmp extends EventEmitter {
    readonly version: { readonly qemu: { readonly major: number } };
    connect(path: string, done: (error: Error | null) => void): this;
    execute(command: string, args: object | null, done: (error: Error | null, value: unknown) => void): void;
    destroy(): this;
  }
}
