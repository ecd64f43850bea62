"""The arithmetic of `benchmarks.ternary_cost` against XLA's count of a forward."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import ternary_cost
from benchmarks.picture_model import flux_config, init_params
from lowbit_jax.models.flux import FLUX_DEV, FluxTransformer, abstract_params, image_ids, text_ids


def test_a_forward_is_what_xla_counts():
    """A block of each kind, as XLA counts the body of a scan once. It counts what is not a product
    too: 0.6 % at this size."""
    config = flux_config(512, 8, 1, 1)
    params = jax.eval_shape(lambda: init_params(config, 0))
    text, model = 40, FluxTransformer(config)
    sizes = [(1, 64, 48), (1, text, 384), (1,), (1, 384)]
    inputs = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]

    def forward(params, x, txt, t, pooled):
        ids = image_ids(8, 8), text_ids(text)
        return model.apply({"params": params}, x, txt, t, pooled, *ids)

    counted = jax.jit(forward).lower(params, *inputs).cost_analysis()["flops"]
    found = ternary_cost.forward_flops(params, config, text, 64)
    assert 0.99 * counted < found < counted


def test_flux_dev():
    """Twice the parameters of the blocks' token-wise linears times tokens, and attention."""
    found = ternary_cost.forward_flops(abstract_params(FLUX_DEV), FLUX_DEV, 512, 4096)
    assert 70e12 < found < 80e12
    hours = ternary_cost.main(ternary_cost.Options())
    assert hours["distill"] == pytest.approx(3 * hours["scales"])
