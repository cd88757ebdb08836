// What a TypeScript program can count on beside the language. The real types of Node.js take a compiler under
// emulation the better part of a minute to read.
declare var console: any;
declare var process: any;
declare var global: any;
declare var Buffer: any;
declare var performance: any;
declare var module: any;
declare var exports: any;
declare var URL: any;
declare var URLSearchParams: any;
declare var TextEncoder: any;
declare var TextDecoder: any;
declare var AbortController: any;
declare var structuredClone: any;
declare function require(name: string): any;
declare function setTimeout(callback: (...values: any[]) => void, milliseconds?: number, ...values: any[]): any;
declare function setInterval(callback: (...values: any[]) => void, milliseconds?: number, ...values: any[]): any;
declare function setImmediate(callback: (...values: any[]) => void, ...values: any[]): any;
declare function clearTimeout(timer: any): void;
declare function clearInterval(timer: any): void;
declare function clearImmediate(timer: any): void;
declare function queueMicrotask(callback: () => void): void;
declare module "*";
