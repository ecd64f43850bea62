"""Pipelines: encoders, sampler and decoder put together."""

from lowbit_jax.pipelines.flux_pipeline import FluxPipeline

__all__ = ["FluxPipeline"]
