// The network in a thread of its own: the page stays quick while it runs.

let ort, session;

self.onmessage = async ({ data }) => {
  try {
    const answer = data.open ? await open(data.open) : await run(data);
    self.postMessage(answer, answer.mask ? [answer.mask.buffer] : []);
  } catch (error) {
    self.postMessage({ failure: String(error?.message ?? error) });
  }
};

/** `provider`: "webgpu" or "wasm". */
async function open(provider) {
  ort = await import(`./runtime/ort.${provider}.min.mjs`);
  ort.env.logLevel = "error";
  // Browsers give threads only to pages that are isolated from all others, which takes two headers of the server.
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  session = await ort.InferenceSession.create(new URL("student.onnx", import.meta.url).href, { executionProviders: [provider] });
  return { threads: ort.env.wasm.numThreads };
}

/** `pixels`: RGBA, one byte a value, row by row. */
async function run({ pixels, width, height }) {
  const began = performance.now();
  const { mask } = await session.run({ pixels: new ort.Tensor("uint8", pixels, [height, width, 4]) });
  return { mask: mask.data.slice(), milliseconds: performance.now() - began };
}
