"""A box on a picture with ONNX Runtime, NumPy and Pillow alone, as `dbsam predict` answers it.

The same graphs in float32, session options, picture and box; no check of anything.

    python benchmarks/timing/bare_predict.py GRAPHS PICTURE OUT.png SIDE x0 y0 x1 y1
"""

import sys
from typing import Any

import numpy as np
from PIL import Image

_MEAN, _SPREAD = np.float32([123.675, 116.28, 103.53]), np.float32([58.395, 57.12, 57.375])


def opened(path: str) -> Any:
    """A graph as our sessions open it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def main() -> None:
    """Write the mask."""
    folder, picture, out, size, *box = sys.argv[1:]
    encoder, decoder = (opened(f"{folder}/{name}.onnx") for name in ("encoder", "decoder"))
    rgb = np.asarray(Image.open(picture).convert("RGB"))
    side, (height, width) = int(size), rgb.shape[:2]
    scale = side / max(height, width)
    inner = (int(width * scale + 0.5), int(height * scale + 0.5))
    bilinear = Image.Resampling.BILINEAR
    small = np.asarray(Image.fromarray(rgb).resize(inner, bilinear)).astype(np.float32)
    pixels = np.zeros((1, 3, side, side), np.float32)
    pixels[0, :, : inner[1], : inner[0]] = ((small - _MEAN) / _SPREAD).transpose(2, 0, 1)
    (embeddings,) = encoder.run(None, {"image": pixels})
    boxes = (np.float32([float(x) for x in box]) * np.float32(scale)).reshape(1, 1, 4)
    logits, _ = decoder.run(None, {"image_embeddings": embeddings, "boxes": boxes})
    frame = Image.fromarray(logits[0, 0, 0]).resize((side, side), bilinear)
    whole = frame.crop((0, 0, *inner)).resize((width, height), bilinear)
    Image.fromarray((np.asarray(whole) > 0).astype(np.uint8)).save(out)


if __name__ == "__main__":
    main()
