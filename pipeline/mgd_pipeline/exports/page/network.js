// Runs the network by WebGPU where it works here, else by WebAssembly. "Works" means: it gives the student's own mask of the test picture.

import { Problem } from "./problem.js";

const LEAST_SAME = 0.999;
const NAMES = { webgpu: "WebGPU", wasm: "WebAssembly" };

export class Network {
  #worker = null;
  #provider;
  #last = Promise.resolve();

  /** `check`: the test picture {pixels, width, height} and the student's own `mask` of it. Throws Problem. */
  static async open(check) {
    if (typeof WebAssembly !== "object") {
      throw new Problem("This browser has no WebAssembly, or it is switched off. The network cannot run here: use a current Chrome, Edge, Firefox or Safari.");
    }
    let reason = "";
    for (const provider of (await hasGpu()) ? ["webgpu", "wasm"] : ["wasm"]) {
      const network = new Network(provider);
      try {
        await network.#start();
        const { mask } = await network.#ask(check);
        const same = mask.reduce((count, id, at) => count + (id === check.mask[at]), 0) / check.mask.length;
        if (same >= LEAST_SAME) return network;
        reason = `it gives ${(100 * (1 - same)).toFixed(1)} % of the pixels of the test picture another class than the student`;
      } catch (error) {
        reason = error.message;
      }
      network.#stop();
    }
    throw new Problem(`The network does not run in this browser (${reason}).`);
  }

  constructor(provider) {
    this.#provider = provider;
  }

  get runtime() {
    return NAMES[this.#provider];
  }

  /** The class of each pixel, and the milliseconds it took. One photo after the other. Throws Problem. */
  run(photo) {
    const turn = this.#last.then(() => this.#run(photo));
    this.#last = turn.catch(() => {});
    return turn;
  }

  async #run(photo) {
    try {
      if (!this.#worker) await this.#start();
      return await this.#ask(photo);
    } catch (error) {
      this.#stop(); // a runtime that failed once is not asked again; the next photo gets a new one
      if (this.#provider === "webgpu") {
        this.#provider = "wasm";
        return this.#run(photo);
      }
      if (isMemory(error)) {
        const size = `${photo.width} × ${photo.height} pixels`;
        throw new Problem(`The photo (${size}) is too large for this browser's memory. Take a smaller one.`);
      }
      throw new Problem(`The network cannot run on this photo (${error.message}).`);
    }
  }

  async #start() {
    this.#worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
    await this.#ask({ open: this.#provider });
  }

  #ask(message) {
    const worker = this.#worker;
    return new Promise((resolve, reject) => {
      worker.onmessage = ({ data }) => (data.failure === undefined ? resolve(data) : reject(new Error(data.failure)));
      worker.onerror = (event) => {
        event.preventDefault();
        reject(new Error(event.message || "a file of the page is missing"));
      };
      worker.postMessage(message);
    });
  }

  #stop() {
    this.#worker?.terminate();
    this.#worker = null;
  }
}

/** Whether there is a graphics processor, not a program that plays one, which is slower than WebAssembly. */
async function hasGpu() {
  try {
    const adapter = await navigator.gpu?.requestAdapter();
    return Boolean(adapter) && !adapter.info?.isFallbackAdapter;
  } catch {
    return false;
  }
}

/** What V8, SpiderMonkey, JavaScriptCore and ONNX Runtime say. A bare number is a C++ exception, which runtimes raise for little else. */
function isMemory(error) {
  return /memory|alloc|out of bounds|array length|buffer size|^\D{0,8}\d+$/i.test(error.message);
}
