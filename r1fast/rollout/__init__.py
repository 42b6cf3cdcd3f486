"""Generation from the trainer's own weights."""
