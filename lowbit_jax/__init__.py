"""Low-bit diffusion transformers in JAX: port, quantise, run."""
