"""Samplers: pure functions over a denoiser, one file each."""
