"""Prompts as a request carries them."""

from typing import Any

import numpy as np

from dbsam_deploy.core.prompts import join_prompts


def prompt_sets(size: tuple[int, int], mask_input: np.ndarray, **given: Any) -> dict[str, Any]:
    """`given` on an image of `size` with an earlier mask for each prompt."""
    coords, labels = join_prompts(size, **given)
    return {
        "point_coords": coords,
        "point_labels": labels,
        "mask_input": mask_input,
        "has_mask_input": np.ones(len(coords), np.float32),
    }
