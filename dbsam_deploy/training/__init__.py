"""Training: samples, prompts, losses, loop, distillation (`python -m dbsam_deploy.train`)."""

from ..extras import require

require("torch", extra="train", what_for="training")
