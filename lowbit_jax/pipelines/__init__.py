"""Pipelines: encoders, sampler and decoder put together."""
