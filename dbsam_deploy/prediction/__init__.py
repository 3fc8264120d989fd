"""Image and prompts → masks, one result."""
