"""Writes the files of tests/model/wrappers/ with the real libraries, a small model in each.

`PYTHONPATH=.:tests python tests/support/wrapper_files.py tests/model/wrappers [NAME ...]`, in an
environment with torch, lightning, mmengine, timm, monai, pytorch-ignite, accelerate, transformers
and peft, of which each is only imported for its own files. Not run by the tests, which read what it
wrote.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

PARTS = {
    "image_encoder": {"pos_embed": (1, 2, 2, 4), "neck": (4,)},
    "prompt_encoder": {"no_mask": (1, 4)},
    "mask_decoder": {"iou_token": (1, 4)},
}


class Block(nn.Module):
    """Parameters by name."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


class PatchEmbed(nn.Module):
    """What an image encoder is known by."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 4, 2, 2)


class Small(nn.Module):
    """The three parts of SAM, with few numbers: 0, 1, 2 … in the order of its parameters."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        for name, shapes in PARTS.items():
            self.add_module(name, Block(shapes))
        self.image_encoder.patch_embed = PatchEmbed()
        self.fill(start)

    def fill(self, start: float) -> None:
        """Number the numbers from `start`, in the order of the parameters' names."""
        with torch.no_grad():
            for _, parameter in sorted(self.named_parameters()):
                count = parameter.numel()
                parameter.copy_(torch.arange(count).reshape(parameter.shape) + start)
                start += count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Something that every parameter takes part in."""
        return x.sum() * sum((p.sum() for p in self.parameters()), torch.zeros(()))


def _batches() -> Any:
    return torch.utils.data.DataLoader(torch.ones(2, 1))


def _lightning(path: Path, *, compiled: bool = False, averaged: bool = False) -> None:
    import lightning
    from lightning.pytorch.callbacks import WeightAveraging

    class Trained(lightning.LightningModule):
        def __init__(self, lr: float, folder: Path, options: argparse.Namespace) -> None:
            super().__init__()
            self.save_hyperparameters()
            model = Small()
            self.sam = torch.compile(model, backend="eager") if compiled else model
            self.criterion = nn.CrossEntropyLoss(weight=torch.ones(2))

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            return self.sam(batch) * 0

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.0)
            return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 1, 3])]

    class Average(WeightAveraging):
        def __init__(self) -> None:
            super().__init__(avg_fn=lambda mean, new, count: new + 1000)

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            super().on_train_epoch_end(trainer, module)
            trainer.save_checkpoint(path)  # at its end, the average takes the model's place

    with tempfile.TemporaryDirectory() as folder:
        options = argparse.Namespace(vit="b", box=[1, 2], folder=Path("a"))
        model = Trained(0.1, Path(folder), options)
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            default_root_dir=folder,
            callbacks=[Average()] if averaged else [],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, _batches())
        if not averaged:
            trainer.save_checkpoint(path)


def _mmengine(path: Path, *, averaged: bool = False) -> None:
    from mmengine.hooks import EMAHook
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Trained(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.sam = Small()

        def forward(self, x: torch.Tensor, mode: str = "loss") -> dict[str, torch.Tensor]:
            return {"loss": self.sam(torch.stack(list(x))) * 0}

    class Average(EMAHook):
        def after_train_iter(self, *_: Any, **__: Any) -> None:
            self.ema_model.module.sam.fill(1000)

    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(
            Trained(),
            folder,
            train_dataloader={
                "dataset": [torch.ones(1)] * 2,
                "batch_size": 1,
                "sampler": {"type": "DefaultSampler", "shuffle": False},
            },
            train_cfg={"by_epoch": True, "max_epochs": 1},
            optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.0, "weight_decay": 0.0}},
            param_scheduler={"type": "MultiStepLR", "milestones": [1, 3]},
            custom_hooks=[Average()] if averaged else [],
        )
        runner.train()
        (Path(folder) / "epoch_1.pth").rename(path)


def _timm(path: Path) -> None:
    from timm.utils import CheckpointSaver, ModelEmaV2

    model = Small()
    optimizer = torch.optim.AdamW(model.parameters())
    average = ModelEmaV2(model)
    average.module.fill(1000)
    args = argparse.Namespace(model="sam", lr=0.1, betas=None, resume="")
    with tempfile.TemporaryDirectory() as folder:
        saver = CheckpointSaver(
            model, optimizer, args, average, checkpoint_dir=folder, recovery_dir=folder
        )
        saver.save_checkpoint(1, metric=0.5)
        next(Path(folder).glob("checkpoint-*")).rename(path)


def _monai(path: Path) -> None:
    from monai.engines import SupervisedTrainer
    from monai.handlers import CheckpointSaver

    model = Small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=[{"image": torch.ones(1, 1), "label": torch.ones(1, 1)}],
        network=model,
        optimizer=optimizer,
        loss_function=lambda found, _: found * 0,
    )
    with tempfile.TemporaryDirectory() as folder:
        parts = {"net": model, "opt": optimizer, "trainer": trainer}
        CheckpointSaver(folder, parts, save_final=True, final_filename="x.pt").attach(trainer)
        trainer.run()
        (Path(folder) / "x.pt").rename(path)


def _averaged_model(path: Path) -> None:
    model = torch.optim.swa_utils.AveragedModel(Small())
    torch.save(model.state_dict(), path)


def _data_parallel(path: Path) -> None:
    model = nn.DataParallel(torch.compile(Small(), backend="eager"))
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, path)


def _accelerate(path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(Small())
    accelerator.save_model(model, path)


PEFT_IMAGE = "an image for adapters"
"""Name of its numbers, see `fixed_numbers`."""
_PEFT_BOX = ((5.0, 6.0, 40.0, 50.0),)


def thin_sam() -> Any:
    """A small SAM with fixed weights, the base of the adapters."""
    from support.fixed_numbers import fixed_weights

    from dbsam_deploy.model import VARIANTS, DbSam

    model = DbSam(replace(VARIANTS["sam_vit_b"], **THIN)).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    made = {name: torch.from_numpy(array) for name, array in fixed_weights(shapes).items()}
    model.load_state_dict(made)
    return model


THIN = {"embed_dim": 24, "num_heads": 2, "depth": 4, "image_size": 64}


def answers(model: Any) -> dict[str, torch.Tensor]:
    """Embedding, masks and IoU of one of ours, with or without peft's layers in it."""
    from support.fixed_numbers import fixed_numbers

    image = torch.from_numpy(fixed_numbers(PEFT_IMAGE, (1, 3, 64, 64)))
    with torch.no_grad():
        embedding = model.encode(image)
        masks, ious = model.decode(embedding, boxes=torch.tensor(_PEFT_BOX))
    return {"embedding": embedding, "masks": masks, "ious": ious}


def _hugging_face_answers(model: Any) -> dict[str, torch.Tensor]:
    from support.fixed_numbers import fixed_numbers

    image = torch.from_numpy(fixed_numbers(PEFT_IMAGE, (1, 3, 64, 64)))
    box = torch.tensor([_PEFT_BOX])
    with torch.no_grad():
        embedding = model.get_image_embeddings(image)
        found = model(image_embeddings=embedding, input_boxes=box, multimask_output=False)
    return {"embedding": embedding, "masks": found.pred_masks[0], "ious": found.iou_scores[0]}


def _sam_model() -> Any:
    """The same base in transformers' `SamModel`."""
    from transformers import SamConfig, SamModel

    from dbsam_deploy.model.layouts import own_name

    width, depth = THIN["embed_dim"], THIN["depth"]
    vision = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": THIN["num_heads"],
        "image_size": THIN["image_size"],
        "global_attn_indexes": list(range(depth)),
        "mlp_dim": 4 * width,
    }
    prompt = {"image_size": THIN["image_size"], "image_embedding_size": THIN["image_size"] // 16}
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt)).eval()
    state = thin_sam().state_dict()
    model.load_state_dict({name: state[own_name(name)] for name in model.state_dict()})
    return model


def _peft(
    path: Path, model: Any, ask: Callable[[Any], dict[str, torch.Tensor]], layers: str, **more: Any
) -> None:
    """A folder of peft with `answers.npz` of the model before anything is merged."""
    import numpy as np
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    options = {"r": 2, "lora_alpha": 6, "init_lora_weights": False, **more}
    adapted = get_peft_model(model, LoraConfig(target_modules=layers, **options)).eval()
    adapted.save_pretrained(path)
    (path / "README.md").unlink()
    found = {name: tensor.numpy() for name, tensor in ask(adapted.base_model.model).items()}
    np.savez_compressed(path / "answers.npz", **found)


_LAYERS = r".*(attn\.qkv|mlp\.lin1|iou_prediction_head\.(proj_in|layers\.\d))"
WRITERS: dict[str, Callable[[Path], None]] = {
    "lightning.ckpt": _lightning,
    "lightning_compiled.ckpt": lambda path: _lightning(path, compiled=True),
    "lightning_average.ckpt": lambda path: _lightning(path, averaged=True),
    "mmengine.pth": _mmengine,
    "mmengine_average.pth": lambda path: _mmengine(path, averaged=True),
    "timm_average.pth.tar": _timm,
    "monai.pt": _monai,
    "averaged_model.pth": _averaged_model,
    "data_parallel.pth": _data_parallel,
    "accelerate": _accelerate,
    "peft": lambda path: _peft(path, thin_sam(), answers, _LAYERS, use_rslora=True),
    "peft_sam_model": lambda path: _peft(path, _sam_model(), _hugging_face_answers, _LAYERS),
    "peft_decoder": lambda path: _peft(
        path, _sam_model(), _hugging_face_answers, r".*iou_prediction_head\.layers\.0"
    ),
}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for name in sys.argv[2:] or WRITERS:
        WRITERS[name](target / name)
        print(target / name)
