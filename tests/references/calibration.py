"""What every linear is given, caught without our calibration: NumPy float64, one layer at a time.

`ops.linear` is watched while `jax.disable_jit` runs scans as Python loops; a call is recognised by
its weights. What comes before a product is computed again from its published formula.
"""

from __future__ import annotations

from unittest import mock

import jax
import numpy as np

from lowbit_jax import ops
from lowbit_jax.calibration.ranges import WHOLE
from lowbit_jax.calibration.statistics import LayerStatistics, Statistics, layer_widths
from lowbit_jax.models.layers import AdaLN, Gelu
from lowbit_jax.quant.stacks import iter_layers


def random_params(model, *inputs, **named):
    """Parameters of every size there is: none is zero, so that nothing is hidden."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs, **named)["params"]
    rng = np.random.default_rng(5)
    draw = lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32)  # noqa: E731
    return jax.tree.map(draw, shapes)


def linear_inputs(model, params, *inputs, **named):
    """{layer path: [rows (n, k) in float64 of each call]} of one forward."""
    kernels = {}
    for path, kernel, index in iter_layers(params):
        kernels[np.asarray(kernel if index is None else kernel[index]).tobytes()] = path
    found = {path: [] for path in kernels.values()}

    def watched(x, kernel, bias=None, *, before=None, **after):
        parts = x if isinstance(x, tuple | list) else [x]
        whole = np.concatenate([np.asarray(part, np.float64) for part in parts], axis=-1)
        seen = _before(whole, before)
        found[kernels[np.asarray(kernel).tobytes()]].append(seen.reshape(-1, seen.shape[-1]))
        return linear(x, kernel, bias, before=before, **after)

    linear = ops.linear
    with mock.patch.object(ops, "linear", watched), jax.disable_jit():
        model.apply({"params": params}, *inputs, **named)
    return found


def _before(x, before):
    if before is None:
        return x
    if isinstance(before, Gelu):
        inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
        return 0.5 * x * (1 + np.tanh(inner))
    assert isinstance(before, AdaLN)
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + before.eps)
    shift, scale = (np.asarray(vectors, np.float64) for vectors in (before.shift, before.scale))
    while shift.ndim < x.ndim:  # a vector per sample or per frame, for all of its tokens
        shift, scale = shift[..., None, :], scale[..., None, :]
    return normed * (1 + scale) + shift


def random_statistics(params, model="dit", config="{}", seed=0, ranges=WHOLE):
    """Statistics that a model with `params` may have: a few channels are much larger."""
    rng, layers = np.random.default_rng(seed), {}
    for path, k in sorted(layer_widths(params).items()):
        shape = (2, len(ranges), k)
        absmax = np.exp(rng.normal(0, 1, shape)).astype(np.float32)
        absmax[..., ::37] *= 30
        count = np.full(shape[:2], 1000)
        squares = rng.uniform(0.05, 0.2, shape) * absmax.astype(float) ** 2 * 1000
        layers[path] = LayerStatistics(
            absmax=absmax, total=np.zeros(shape), squares=squares, count=count
        )
    halves = ("conditional", "unconditional")
    return Statistics(
        layers=layers,
        ranges=ranges,
        halves=halves,
        model=model,
        config=config,
        samples=1,
        digest="",
    )
