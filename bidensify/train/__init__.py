"""Training: the loop that runs a recipe, its stages, losses, checkpoints and distribution."""
