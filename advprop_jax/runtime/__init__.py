"""What any training code has: config, devices, checkpoints, metrics."""
