"""PyTorch checkpoints to Flax trees: readers, name tables, `port`, `convert_and_quantize`."""
