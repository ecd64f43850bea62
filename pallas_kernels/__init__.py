"""Ground floor: byte layouts, reference operations and kernels; knows jax and numpy only."""
