"""Answers of EfficientViT-SAM's own code, as `family_references` has those of the others.

`PYTHONPATH=.:tests python tests/support/efficient_vit_reference.py efficientvit_sam_l0 FOLDER
OUT.npz` with the folder of the unpacked wheel of `efficientsam` 1.0.0 (PyPI), in an environment
with torch; `--full` takes the real shapes, and compares with our model in place of writing.

The code imports torchvision, which has no build for every torch: its few functions that the
predictor calls are written below with Pillow, as torchvision calls it for such images.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from support.family_references import ORIGINAL, answers, compare, double_resize, picture
from support.fixed_numbers import fixed_weights
from torch import Tensor, nn

from dbsam_deploy.model.config import EfficientVitConfig

BOX = (10.5, 8.0, 40.0, 37.25)
"""x0, y0, x1, y1 in the picture."""
SMALL: dict[str, dict[str, Any]] = {
    "efficientvit_sam_l0": {
        "width_list": [8, 8, 16, 16, 32],
        "depth_list": [1, 1, 1, 1, 1],
        "qkv_dim": 2,  # fewer than the pixels of the last map, as in the real model
    },
    "efficientvit_sam_xl0": {
        "width_list": [8, 8, 16, 16, 16, 32],
        "depth_list": [0, 1, 1, 1, 1, 1],
        "block_list": ["res", "fmb", "fmb", "fmb", "att@3", "att@3"],
        "expand_list": [1, 4, 4, 4, 4, 6],
        "fewer_norm_list": [False, False, False, False, True, True],
        "qkv_dim": 8,
    },
}
"""Arguments of the backbone of a small model."""
_OURS: dict[str, Any] = {
    "widths": (8, 8, 16, 16, 32),
    "depths": (1, 1, 1, 1, 1),
    "head_dim": 2,
    "neck_depth": 1,
    "frame_size": 128,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "efficientvit_sam_l0": {"image_size": 64, "efficient_vit": EfficientVitConfig(**_OURS)},
    "efficientvit_sam_xl0": {
        "image_size": 128,
        "efficient_vit": replace(
            EfficientVitConfig(**_OURS),
            widths=(8, 8, 16, 16, 16, 32),
            depths=(0, 1, 1, 1, 1, 1),
            kinds=("pair", "fused", "fused", "fused", "attention", "attention"),
            expand=(1, 4, 4, 4, 4, 6),
            attention_kernel=3,
            head_dim=8,
        ),
    },
}
"""The same of ours, as changes of the variants' configurations."""
FRAME = 128
SIZES = {"efficientvit_sam_l0": 64, "efficientvit_sam_xl0": 128}
"""Image sizes of the small models."""


def stand_in_for_torchvision() -> None:
    """What the family's code takes from torchvision."""

    def normalise(mean: list[float], std: list[float]) -> Callable[[Tensor], Tensor]:
        centre, spread = (torch.tensor(values)[:, None, None] for values in (mean, std))
        return lambda image: (image - centre) / spread

    def compose(steps: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
        def run(image: Any) -> Any:
            for step in steps:
                image = step(image)
            return image

        return run

    def to_tensor() -> Callable[[np.ndarray], Tensor]:
        return lambda image: torch.from_numpy(image.transpose(2, 0, 1).copy()).float().div(255)

    def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
        return image.resize(size[::-1], Image.Resampling.BILINEAR)

    parts: dict[str, dict[str, Any]] = {
        "torchvision": {},
        "torchvision.ops": {},
        "torchvision.ops.boxes": {"batched_nms": None, "box_area": None},
        "torchvision.transforms": {
            "Compose": compose,
            "ToTensor": to_tensor,
            "Normalize": normalise,
        },
        "torchvision.transforms.functional": {"to_pil_image": Image.fromarray, "resize": resize},
    }
    for name, values in parts.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(values)
    sys.modules["torchvision"].__dict__["transforms"] = sys.modules["torchvision.transforms"]


def small_model(name: str) -> Any:
    """A model of the family with few channels, at half SAM's embedding."""
    from efficientsam.models.efficientvit import sam as code
    from efficientsam.models.efficientvit.backbone import EfficientViTLargeBackbone
    from efficientsam.models.nn.norm import set_norm_eps

    widths = SMALL[name]["width_list"]
    neck = code.SamNeck(
        fid_list=[f"stage{len(widths) - i}" for i in (1, 2, 3)],
        in_channel_list=widths[:-4:-1],
        head_width=256,
        head_depth=1,
        expand_ratio=1,
        middle_op="fmb",
    )
    grid = FRAME // 16
    for inputs in neck.input_ops:
        inputs.op_list[1].size = (grid, grid)
    encoder = code.EfficientViTSamImageEncoder(EfficientViTLargeBackbone(**SMALL[name]), neck)
    sam = code.build_efficientvit_sam(encoder, SIZES[name])
    sam.image_size = (FRAME, SIZES[name])
    sam.prompt_encoder = code.PromptEncoder(256, (grid, grid), (FRAME, FRAME), mask_in_chans=16)
    set_norm_eps(sam, 1e-6)
    return sam


def build(name: str, *, full: bool) -> Any:
    """The family's model with fixed weights."""
    from efficientsam.sam_model_zoo import create_efficientvit_sam_model

    sam = (
        create_efficientvit_sam_model(name.replace("_", "-"), pretrained=False)
        if full
        else small_model(name)
    )
    shapes = {key: tuple(tensor.shape) for key, tensor in sam.state_dict().items()}
    made = {key: torch.from_numpy(array) for key, array in fixed_weights(shapes).items()}
    sam.load_state_dict(made)
    return sam.eval()


def own_answers(sam: Any) -> dict[str, Tensor]:
    """What the family's model and its predictor give."""
    from efficientsam.models.efficientvit.sam import EfficientViTSamPredictor

    frame, size = sam.image_size
    found = answers(sam, sam.image_encoder, size, frame)
    predictor = EfficientViTSamPredictor(sam)
    predictor.set_image(picture())
    found["whole"] = sam.postprocess_masks(found["boxes_masks"], predictor.input_size, ORIGINAL)
    masks, ious, _ = predictor.predict(
        box=np.array(BOX), multimask_output=False, return_logits=True
    )
    found["predicted"], found["predicted_iou"] = torch.from_numpy(masks), torch.from_numpy(ious)
    found["pixels"] = sam.transform(picture())
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant")
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args()
    stand_in_for_torchvision()
    sys.path.insert(0, str(args.folder))
    sam = build(args.variant, full=args.full)
    with torch.inference_mode(), double_resize() if args.full else nullcontext():
        found = own_answers(sam)
    if args.full:
        compare_predicted(args.variant, sam, found)
        return
    shapes = {name: list(tensor.shape) for name, tensor in sam.state_dict().items()}
    arrays = {name: tensor.numpy() for name, tensor in found.items()}
    texts = {"keys": np.array(json.dumps(shapes)), "eps": np.array(json.dumps(norm_eps(sam)))}
    np.savez_compressed(args.out, **texts, **arrays)


def norm_eps(sam: nn.Module) -> dict[str, float]:
    """`eps` of each norm, by its name."""
    norms = {name: one for name, one in sam.named_modules() if hasattr(one, "eps")}
    return {name: one.eps for name, one in norms.items() if hasattr(one, "weight")}


def predicted(model: Any) -> tuple[Tensor, Tensor]:
    """Our logits and IoU of the picture's box."""
    from dbsam_deploy.core.imaging import preprocess, to_model_frame, upscale_logits

    how = model.config.frame
    pixels = torch.from_numpy(preprocess(picture(), how))
    box = torch.from_numpy(to_model_frame(np.array([BOX], np.float32), ORIGINAL, how))
    low, iou = model.decode(model.encode(pixels), boxes=box)
    return torch.from_numpy(upscale_logits(low[0, 0].numpy(), ORIGINAL, how))[None], iou[0]


def compare_predicted(name: str, sam: Any, found: dict[str, Tensor]) -> None:
    """Print how far our model is from the family's."""
    from dbsam_deploy.model import build_model

    extra = {key: found.pop(key) for key in ("predicted", "predicted_iou", "pixels")}
    compare(name, sam.state_dict(), found, sam.image_size[1])
    model = build_model(name)
    model.load_state_dict(sam.state_dict(), strict=True)
    with torch.inference_mode():
        ours = dict(zip(("predicted", "predicted_iou"), predicted(model), strict=True))
    for key, tensor in ours.items():
        error = (tensor - extra[key]).abs().max() / extra[key].abs().max()
        print(f"{key}: {float(error):.2e}")


if __name__ == "__main__":
    main()
