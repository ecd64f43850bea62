"""The step that is compiled for a GPU is one that runs: on a small FLUX, in numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.distill_memory import program
from lowbit_jax.models.flux import FluxConfig

SMALL = FluxConfig(
    in_channels=16,
    vec_in_dim=24,
    context_in_dim=32,
    hidden_size=64,
    num_heads=2,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(8, 12, 12),
)


@pytest.mark.slow
def test_the_step_trains_scales_and_nothing_else():
    step, specs = program(SMALL, pixels=32, batch=2)
    rng = np.random.default_rng(0)

    def made(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.ones(leaf.shape, leaf.dtype)
        return jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype)

    state, frozen, batch = jax.tree.map(made, specs)
    state["step"] = jnp.int32(30)
    state["optimizer"] = jax.tree.map(jnp.zeros_like, state["optimizer"])
    before = jax.tree.map(np.asarray, state["trained"])
    assert all("weight" not in name and "codes" not in name for name in state["trained"])
    assert any("codes" in name for name in frozen)
    new, bad = step(state, frozen, batch)
    again, bad_again = step(jax.tree.map(jnp.copy, new), frozen, batch)  # Adam's first has rate 0
    assert not np.asarray(bad).any() and not np.asarray(bad_again).any()
    assert int(new["step"]) == 31
    growths = [name for name in before if name.endswith("growth")]
    assert growths
    for name in growths:
        assert not np.array_equal(again["trained"][name], before[name]), name
    assert np.isfinite(new["losses"][30]) and new["losses"][30] > 0
