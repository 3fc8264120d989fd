"""Answers of each family's own code, for tests/model/families/ and, at full size, by hand.

`PYTHONPATH=.:tests python tests/support/family_references.py mobile_sam FOLDER OUT.npz` with the
folder that holds the family's package, in an environment with torch; sam_med2d needs OpenCV too.
`--full` takes the real shapes, and compares with our model in place of writing OUT.npz; there the
family's code resizes masks in float64 (`double_resize`). Not run by the tests, which read what it
wrote. The packages on PyPI: `mobilesam-mirror` 1.0.0 (`mobile_sam`), `isat-sam` 1.5.2 (SAM-Med2D:
`ISAT/segment_any/segment_anything_med2d`), `segment-anything` 1.0. EfficientViT-SAM has a script
of its own, `efficient_vit_reference.py`.

Weights and inputs follow from their names (`fixed_numbers`), so that none is stored.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.fixed_numbers import fixed_numbers, fixed_weights
from torch import Tensor, nn

ORIGINAL = (45, 70)
"""Height and width of the user's image."""


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        package: folder of its modeling code, below the folder that is named.
        encoder: makes its image encoder, small or of the real shapes.
        encode: runs it.
        image_size: of the small and the real model.
        content: height and width that an image of `ORIGINAL` fills in the model frame.
    """

    package: str
    encoder: Callable[[Any, bool], nn.Module]
    encode: Callable[[Any, Tensor, bool], Tensor]
    image_size: tuple[int, int]
    squeezed: bool = False

    def content(self, size: int) -> tuple[int, int]:
        """See the class."""
        height, width = ORIGINAL
        scale = size / max(ORIGINAL)
        return (size, size) if self.squeezed else (int(height * scale + 0.5), int(width * scale))


def _mobile(code: Any, full: bool) -> nn.Module:
    small = {"embed_dims": [8, 16, 32, 320], "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 4]}
    real = {"embed_dims": [64, 128, 160, 320], "depths": [2, 2, 6, 2], "num_heads": [2, 4, 5, 10]}
    options = {"drop_path_rate": 0.0, "layer_lr_decay": 0.8, **(real if full else small)}
    return code.TinyViT(img_size=1024 if full else 128, window_sizes=[7, 7, 14, 7], **options)


def _encode_mobile(encoder: Any, image: Tensor, full: bool) -> Tensor:
    if full:
        return encoder(image)
    x = encoder.patch_embed(image)  # its own forward is written for 1024 pixels alone
    for layer in encoder.layers:
        x = layer(x)
    side = image.shape[2] // 16
    return encoder.neck(x.reshape(len(x), side, side, -1).permute(0, 3, 1, 2))


def _vit(code: Any, full: bool, *, dim: int, depth: int, heads: int, size: int, **more: Any) -> Any:
    if not full:
        dim, depth, heads, size = 32, 8, 2, 64
    return code.ImageEncoderViT(
        img_size=size,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=tuple(range(depth // 4 - 1, depth, depth // 4)),
        **more,
    )


def _run(encoder: Any, image: Tensor, full: bool) -> Tensor:
    return encoder(image)


FAMILIES = {
    "mobile_sam": Family("mobile_sam/modeling", _mobile, _encode_mobile, (128, 1024)),
    "sam_med2d": Family(
        "segment_anything_med2d/modeling",
        partial(_vit, dim=768, depth=12, heads=12, size=256, adapter_train=True),
        _run,
        (64, 256),
        squeezed=True,
    ),
    "sam_vit_l": Family(
        "segment_anything/modeling",
        partial(_vit, dim=1024, depth=24, heads=16, size=1024),
        _run,
        (64, 1024),
    ),
    "sam_vit_h": Family(
        "segment_anything/modeling",
        partial(_vit, dim=1280, depth=32, heads=16, size=1024),
        _run,
        (64, 1024),
    ),
}


def load_code(folder: Path) -> Any:
    """A family's `modeling` package, without what its other modules import."""
    layers = types.ModuleType("timm.models.layers")
    layers.__dict__.update(
        DropPath=nn.Identity, to_2tuple=lambda x: (x, x), trunc_normal_=nn.init.trunc_normal_
    )
    registry = types.ModuleType("timm.models.registry")
    registry.__dict__.update(register_model=lambda made: made)
    for name in ("timm", "timm.models"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["timm.models.layers"], sys.modules["timm.models.registry"] = layers, registry
    place = folder / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        "family_code", place, submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise SystemExit(f"{place} is not there")
    module = importlib.util.module_from_spec(spec)
    sys.modules["family_code"] = module
    spec.loader.exec_module(module)
    return module


def build(family: Family, code: Any, *, full: bool) -> Any:
    """The family's model with fixed weights."""
    size = family.image_size[full]
    grid = size // 16
    sam = nn.Module()
    sam.image_encoder = family.encoder(code, full)
    sam.prompt_encoder = code.PromptEncoder(
        embed_dim=256,
        image_embedding_size=(grid, grid),
        input_image_size=(size, size),
        mask_in_chans=16,
    )
    sam.mask_decoder = code.MaskDecoder(
        num_multimask_outputs=3,
        transformer=code.TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
        transformer_dim=256,
        iou_head_depth=3,
        iou_head_hidden_dim=256,
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in sam.state_dict().items()}
    made = {name: torch.from_numpy(array) for name, array in fixed_weights(shapes).items()}
    sam.load_state_dict(made)
    return sam.eval()


def prompts(size: int) -> dict[str, Tensor]:
    """Two boxes, two sets of three points and earlier logits, in the model frame."""
    unit = {name: fixed_numbers(name, (2, 3, 2)) / 2 + 0.5 for name in ("points", "corners")}
    corners = np.sort(unit["corners"][:, :2], axis=1).reshape(2, 4) * size
    return {
        "boxes": torch.from_numpy(corners.astype(np.float32)),
        "points": torch.from_numpy((unit["points"] * size).astype(np.float32)),
        "labels": torch.tensor([[1, 0, 1], [0, 1, 1]]),
        "masks": torch.from_numpy(fixed_numbers("masks", (2, 1, size // 4, size // 4)) * 4),
    }


def image_of(size: int) -> Tensor:
    """(1, 3, S, S) in the model frame."""
    return torch.from_numpy(fixed_numbers("image", (1, 3, size, size)) * 2)


def answers(
    sam: Any, encode: Callable[[Tensor], Tensor], size: int, frame: int | None = None
) -> dict[str, Tensor]:
    """Embedding, masks of boxes and masks of points with earlier logits.

    Args:
        sam: a model with a prompt encoder and a mask decoder.
        encode: its encoder.
        size: side of the image that the encoder takes.
        frame: side of the model frame, by default the same.
    """
    asked = prompts(frame or size)
    embedding = encode(image_of(size))
    found = {"embedding": embedding}
    for name, chosen, multimask in (
        ("boxes", {"points": None, "boxes": asked["boxes"], "masks": None}, False),
        (
            "points",
            {
                "points": (asked["points"], asked["labels"]),
                "boxes": None,
                "masks": asked["masks"],
            },
            True,
        ),
    ):
        sparse, dense = sam.prompt_encoder(**chosen)
        masks, iou = sam.mask_decoder(
            image_embeddings=embedding,
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )
        found[f"{name}_masks"], found[f"{name}_iou"] = masks, iou
    return found


@contextmanager
def double_resize() -> Iterator[None]:
    """Bilinear resizing in float64, rounded once.

    In float32 PyTorch's own is up to 1.6e-5 from that, more than all that comes before it.
    """
    resize = nn.functional.interpolate

    def in_double(x: Tensor, *args: Any, **options: Any) -> Tensor:
        bilinear = options.get("mode") == "bilinear"
        return resize(x.double() if bilinear else x, *args, **options).to(x.dtype)

    nn.functional.interpolate = in_double
    try:
        yield
    finally:
        nn.functional.interpolate = resize


def whole_mask(family: Family, low: Tensor, size: int) -> Tensor:
    """Logits in the user's image, by the family's own two steps."""
    interpolate = partial(nn.functional.interpolate, mode="bilinear", align_corners=False)
    height, width = family.content(size)
    return interpolate(interpolate(low, (size, size))[..., :height, :width], ORIGINAL)


def picture() -> np.ndarray:
    """(45, 70, 3) uint8."""
    return ((fixed_numbers("picture", (*ORIGINAL, 3)) / 2 + 0.5) * 255).astype(np.uint8)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args()
    family = FAMILIES[args.family]
    size = family.image_size[args.full]
    sam = build(family, load_code(args.folder / family.package), full=args.full)
    with torch.inference_mode(), double_resize() if args.full else nullcontext():
        found = answers(sam, lambda x: family.encode(sam.image_encoder, x, args.full), size)
        found["whole"] = whole_mask(family, found["boxes_masks"], size)
    if args.full:
        compare(args.family, sam.state_dict(), found, size)
        return
    arrays = {name: tensor.numpy() for name, tensor in found.items()}
    if family.squeezed:
        import cv2

        arrays["resized"] = cv2.resize(picture(), (size, size), interpolation=cv2.INTER_NEAREST)
    shapes = {name: list(tensor.shape) for name, tensor in sam.state_dict().items()}
    np.savez_compressed(args.out, keys=np.array(json.dumps(shapes)), **arrays)


def compare(name: str, state: dict[str, Tensor], found: dict[str, Tensor], size: int) -> None:
    """Print how far our model is from the family's, as a share of the largest value."""
    from dbsam_deploy.core.imaging import upscale_logits
    from dbsam_deploy.model import build_model
    from dbsam_deploy.model.layouts import own_names

    model = build_model(name)
    own = own_names(state)
    wanted = model.state_dict()
    model.load_state_dict({key: own[key] for key in wanted}, strict=True)
    print(f"{name}: not taken: {sorted(set(own) - set(wanted))}")
    with torch.inference_mode():
        ours = answers(model, model.encode, size, model.config.frame.frame_side)
    low = ours["boxes_masks"][0, 0].numpy()
    first = torch.from_numpy(upscale_logits(low, ORIGINAL, model.config.frame))
    ours["whole"], found["whole"] = first, found["whole"][0, 0]
    for key, tensor in found.items():
        largest = float(tensor.abs().max())
        print(f"{key}: {float((ours[key] - tensor).abs().max()) / largest:.2e} of {largest:.3g}")


if __name__ == "__main__":
    main()
