"""Training: samples, prompts, losses, loop, distillation (`python -m dbsam_deploy.train`)."""
