"""From published PyTorch files to Flax parameter pytrees."""
