"""PyTorch checkpoints to Flax parameter trees: readers, name tables, `port`, `convert_and_quantize`."""
