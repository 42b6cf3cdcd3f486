"""Process group, sharding, optimizers and checkpoints."""
