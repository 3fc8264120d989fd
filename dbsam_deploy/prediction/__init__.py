"""Image and prompts → masks: one opened model, one result."""
