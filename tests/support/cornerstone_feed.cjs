// What @cornerstonejs/ai 4.19 does with a model, in Node: its calls of ONNX Runtime, in its order.
//
//   node cornerstone_feed.cjs RUNTIME MODELS CANVAS MASK PROMPTS
//
// RUNTIME is the folder of onnxruntime-web or onnxruntime-node, MODELS has encoder.onnx and decoder.onnx,
// CANVAS is 1024×1024 RGBA, MASK gets one byte a pixel as the viewer reads them, PROMPTS is JSON:
// {points: [x, y, …], labels: […]}. Prints dtype and shape of what the models answer.
const fs = require('node:fs');
const path = require('node:path');

const SIDE = 1024;
const [runtime, models, canvasFile, maskFile, promptText] = process.argv.slice(2);

class ImageData {
  constructor(width, height) {
    this.width = width;
    this.height = height;
    this.data = new Uint8ClampedArray(4 * width * height);
  }
}

// A canvas that gives back what was put in: all that the runtime asks of one here.
class OffscreenCanvas {
  getContext() {
    return {
      putImageData: (image) => (this.image = image),
      getImageData: () => this.image,
      createImageData: (width, height) => new ImageData(width, height),
    };
  }
}
Object.assign(globalThis, { ImageData, OffscreenCanvas });

async function main() {
  const ort = require(runtime);
  const options = {
    executionProviders: [path.basename(runtime) === 'onnxruntime-web' ? 'wasm' : 'cpu'],
    enableMemPattern: false,
    enableCpuMemArena: false,
    interOpNumThreads: 4,
    intraOpNumThreads: 2,
  };
  const open = (name) =>
    ort.InferenceSession.create(new Uint8Array(fs.readFileSync(path.join(models, name))), options);
  const encoder = await open('encoder.onnx');
  const decoder = await open('decoder.onnx');

  const canvas = new ImageData(SIDE, SIDE);
  canvas.data.set(fs.readFileSync(canvasFile));
  const image = await ort.Tensor.fromImage(canvas, { resizedWidth: SIDE, resizedHeight: SIDE });
  const embeddings = await encoder.run({ input_image: image });

  const { points, labels } = JSON.parse(promptText);
  const found = embeddings.image_embeddings;
  const answer = await decoder.run({
    image_embeddings: new ort.Tensor(found.type, Float32Array.from(found.data), found.dims),
    point_coords: new ort.Tensor(new Float32Array(points), [1, points.length / 2, 2]),
    point_labels: new ort.Tensor(new Float32Array(labels), [1, labels.length]),
    mask_input: new ort.Tensor(new Float32Array(256 * 256), [1, 1, 256, 256]),
    has_mask_input: new ort.Tensor(new Float32Array([0]), [1]),
    orig_im_size: new ort.Tensor(new Float32Array([SIDE, SIDE]), [2]),
  });
  const drawn = answer.masks.toImageData();
  const red = Uint8Array.from({ length: SIDE * SIDE }, (_, i) => drawn.data[4 * i]);
  fs.writeFileSync(maskFile, red);
  const shapes = Object.entries({ ...embeddings, ...answer }).map(([k, v]) => [k, v.type, v.dims]);
  console.log(JSON.stringify(shapes));
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
