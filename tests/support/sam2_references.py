"""Answers of SAM 2's own image predictor, for tests/model/families/ and, at full size, by hand.

`PYTHONPATH=.:tests python tests/support/sam2_references.py FOLDER OUT.npz` with the unpacked source
of PyPI's `sam2` 1.1.0. `--full VARIANT` takes the real shapes, and compares with our model in place
of writing OUT.npz. Not run by the tests, which read what it wrote. Of torchvision, which has no
build for every torch, three transforms are stood in for by what they call in torch.

Weights and inputs follow from their names (`fixed_numbers`), so that none is stored.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.family_references import ORIGINAL, double_resize, picture
from support.fixed_numbers import fixed_numbers, fixed_weights
from torch import Tensor, nn

from dbsam_deploy.model.config import VARIANTS, HieraConfig, ModelConfig

SMALL = replace(
    VARIANTS["sam2_hiera_tiny"],
    image_size=64,
    hiera=HieraConfig(embed_dim=8, depths=(1, 2, 3, 2), global_blocks=(4,), position_side=3),
)
"""Of which the recorded answers are."""


class _Resize(nn.Module):
    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = list(size)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(
            x[None], self.size, mode="bilinear", align_corners=False, antialias=True
        )[0]


class _Normalize(nn.Module):
    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def _to_tensor() -> Any:
    return lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def load_code(folder: Path) -> None:
    """Make `import sam2.modeling…` work without what its package imports for training."""
    made = {
        name: types.ModuleType(name)
        for name in ("sam2", "iopath", "iopath.common", "iopath.common.file_io")
    }
    made["sam2"].__path__ = [str(folder / "sam2")]
    made["iopath.common.file_io"].__dict__["g_pathmgr"] = None
    made["torchvision"] = types.ModuleType("torchvision")
    transforms = made["torchvision.transforms"] = types.ModuleType("torchvision.transforms")
    transforms.__dict__.update(Resize=_Resize, Normalize=_Normalize, ToTensor=_to_tensor)
    sys.modules.update(made)


def _encoder(config: ModelConfig) -> Any:
    from sam2.modeling.backbones.hieradet import Hiera
    from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
    from sam2.modeling.position_encoding import PositionEmbeddingSine

    own = config.hiera
    assert own is not None
    trunk = Hiera(
        embed_dim=own.embed_dim,
        num_heads=own.num_heads,
        stages=own.depths,
        global_att_blocks=own.global_blocks,
        window_spec=own.window_sizes,
        window_pos_embed_bkg_spatial_size=(own.position_side,) * 2,
    )
    neck = FpnNeck(
        PositionEmbeddingSine(256, normalize=True),
        d_model=256,
        backbone_channel_list=[own.embed_dim * 2**i for i in (3, 2, 1, 0)],
        fpn_top_down_levels=[2, 3],
        fpn_interp_model="nearest",
    )
    return ImageEncoder(trunk, neck, scalp=1)


def _memory(grid: int) -> dict[str, Any]:
    """What image mode has no use for: its keys are in every file."""
    from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
    from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
    from sam2.modeling.position_encoding import PositionEmbeddingSine
    from sam2.modeling.sam.transformer import RoPEAttention

    rope = {"feat_sizes": (grid, grid), "embedding_dim": 256, "num_heads": 1, "downsample_rate": 1}
    layer = MemoryAttentionLayer(
        activation="relu",
        dim_feedforward=2048,
        dropout=0.1,
        pos_enc_at_attn=False,
        self_attention=RoPEAttention(**rope),
        d_model=256,
        pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False,
        cross_attention=RoPEAttention(**rope, rope_k_repeat=True, kv_in_dim=64),
    )
    encoder = MemoryEncoder(
        out_dim=64,
        mask_downsampler=MaskDownSampler(kernel_size=3, stride=2, padding=1),
        fuser=Fuser(CXBlock(256, kernel_size=7, padding=3, use_dwconv=True), num_layers=2),
        position_encoding=PositionEmbeddingSine(64, normalize=True),
    )
    return {"memory_attention": MemoryAttention(256, True, layer, 4), "memory_encoder": encoder}


def build(config: ModelConfig) -> Any:
    """SAM 2's model, with its memory, of a variant's sizes and with fixed weights."""
    from sam2.modeling.sam2_base import SAM2Base

    sam = SAM2Base(
        image_encoder=_encoder(config),
        **_memory(config.image_size // 16),
        image_size=config.image_size,
        directly_add_no_mem_embed=True,
        no_obj_embed_spatial=True,
        use_high_res_features_in_sam=True,
        multimask_output_in_sam=True,
        iou_prediction_use_sigmoid=True,
        use_obj_ptrs_in_encoder=True,
        proj_tpos_enc_in_obj_ptrs=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        fixed_no_obj_ptr=True,
        multimask_output_for_tracking=True,
        use_multimask_token_for_obj_ptr=True,
        use_mlp_for_obj_ptr_proj=True,
        # as `build_sam2` has it
        sam_mask_decoder_extra_args={
            "dynamic_multimask_via_stability": True,
            "dynamic_multimask_stability_delta": 0.05,
            "dynamic_multimask_stability_thresh": 0.98,
        },
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in sam.state_dict().items()}
    sam.load_state_dict(made_weights(shapes))
    return sam.eval()


def made_weights(shapes: Mapping[str, Any]) -> dict[str, Tensor]:
    """Fixed weights of SAM 2's names."""
    return {name: torch.from_numpy(array) for name, array in fixed_weights(shapes).items()}


def asked(side: int) -> dict[str, dict[str, Any]]:
    """What is asked about the picture, in its pixels: arguments of `SAM2ImagePredictor.predict`.

    Args:
        side: of the mask grid.
    """
    masks = fixed_numbers("masks", (2, 1, side, side)) * 4
    size = np.array([ORIGINAL[1], ORIGINAL[0]], np.float32)
    unit = {name: fixed_numbers(name, (2, 3, 2)) / 2 + 0.5 for name in ("points", "corners")}
    boxes = (np.sort(unit["corners"][:, :2], axis=1) * size).reshape(2, 4)
    points = {
        "point_coords": unit["points"] * size,
        "point_labels": np.array([[1, 0, 1], [0, 1, 1]], np.int32),
    }
    return {
        "boxes": {"box": boxes, "multimask_output": False},
        "points": {**points, "multimask_output": False},
        "several": {**points, "multimask_output": True},
        "both": {"box": boxes, **points, "multimask_output": False},
        "again": {**points, "multimask_output": True, "mask_input": masks},
    }


def crafted() -> np.ndarray:
    """(6, 4, 8, 8) logits, of which the single mask is stable in some."""
    logits = fixed_numbers("crafted", (6, 4, 8, 8))
    return logits * np.array([0.05, 0.2, 1, 4, 40, -1], np.float32)[:, None, None, None]


def family_answers(
    config: ModelConfig, resizing: AbstractContextManager[None]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Answers of the family's own code, whose masks are resized within `resizing`; its state."""
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    sam = build(config)
    predictor = SAM2ImagePredictor(sam)
    side = config.image_size // 4
    predictor._bb_feat_sizes = [(side // k,) * 2 for k in (1, 2, 4)]
    predictor.set_image(picture())
    finer = predictor._features["high_res_feats"]
    found = {
        "pixels": predictor._transforms(picture())[None],
        "image_embeddings": predictor.get_image_embedding(),
        "high_res_feats_0": finer[0],
        "high_res_feats_1": finer[1],
    }
    with resizing:
        for name, prompt in asked(side).items():
            for part, array in zip(
                ("", "_iou", "_low"), predictor.predict(**prompt, return_logits=True), strict=True
            ):
                found[name + part] = torch.from_numpy(array)
    logits, scores = torch.from_numpy(crafted()), torch.from_numpy(fixed_numbers("iou", (6, 4)))
    chosen = sam.sam_mask_decoder._dynamic_multimask_via_stability(logits, scores)
    found["chosen"], found["chosen_iou"] = chosen
    return {name: tensor.detach().numpy() for name, tensor in found.items()}, sam.state_dict()


def our_answers(predictor: Any) -> dict[str, np.ndarray]:
    """The same of a `Predictor`, as full-size logits."""
    from dbsam_deploy.core.features import unpack
    from dbsam_deploy.core.imaging import preprocess, upscale_logits

    how = predictor.preprocessing
    predictor.set_image(picture())
    found = {"pixels": preprocess(picture(), how), **unpack(predictor.encode(picture()), how)}
    for name, prompt in asked(how.mask_side).items():
        given = {key: prompt.get(key) for key in ("point_coords", "point_labels", "mask_input")}
        if given["mask_input"] is not None:
            given["mask_input"] = given["mask_input"][:, 0]
        if name == "boxes":
            answer = predictor.predict_boxes(prompt["box"])
        else:
            answer = predictor.predict_prompts(
                boxes=prompt.get("box"), multimask=prompt["multimask_output"], **given
            )
        found[name] = np.stack(
            [[upscale_logits(one, ORIGINAL, how) for one in row] for row in answer.known_logits()]
        )
        found[f"{name}_iou"], found[f"{name}_low"] = answer.ious, answer.known_logits()
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--full", metavar="VARIANT")
    args = parser.parse_args()
    load_code(args.folder)
    if args.full:
        # MedSAM2 is held against SAM 2's predictor, which takes images as SAM 2 does
        compare(replace(VARIANTS[args.full], preprocessing=SMALL.preprocessing))
        return
    found, state = family_answers(SMALL, nullcontext())
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    np.savez_compressed(args.out, keys=np.array(json.dumps(shapes)), **found)


def compare(config: ModelConfig) -> None:
    """Print how far our model is from the family's, as a share of the largest value."""
    from dbsam_deploy.model import DbSam
    from dbsam_deploy.model.layouts import own_names
    from dbsam_deploy.prediction.predictor import Predictor
    from dbsam_deploy.sessions.pytorch_session import PytorchSession

    with torch.inference_mode():
        expected, state = family_answers(config, double_resize())
    model = DbSam(config).eval()
    own = own_names(state)
    wanted = model.state_dict()
    model.load_state_dict({key: own[key] for key in wanted}, strict=True)
    left = sorted({key.split(".")[0] for key in set(own) - set(wanted)})
    print(f"{config.name}: not taken: {left}")
    found = our_answers(Predictor(PytorchSession(model), config.frame))
    for key, array in found.items():
        ours, theirs = array.reshape(-1), expected[key].reshape(-1)
        largest = float(np.abs(theirs).max())
        print(f"{key}: {float(np.abs(ours - theirs).max()) / largest:.2e} of {largest:.3g}")


if __name__ == "__main__":
    main()
