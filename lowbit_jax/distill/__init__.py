"""A quantised model taught by its float model: trajectories, latent weights, training (optax)."""
