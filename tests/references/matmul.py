"""Scaled products of codes in NumPy, written from the formula: what the kernels must equal."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats import FORMATS, pack_codes
from pallas_kernels.rows import QuantizedRows


class Product(NamedTuple):
    """Operands as `api.matmul` takes them, and what they stand for in NumPy."""

    x: QuantizedRows | jnp.ndarray
    options: dict
    codes: np.ndarray  # int8 (n, k)
    values: np.ndarray  # int64 codes of x, or its float64 values (m, k)

    @property
    def args(self):
        """(x, w, scale), the positional arguments."""
        names = ("w", "scale")
        return (self.x, *(self.options[name] for name in names))

    @property
    def keywords(self):
        """The rest."""
        return {key: value for key, value in self.options.items() if key not in ("w", "scale")}

    def shifted(self, group_index):
        """int64 (n, k): codes minus their zero points."""
        zero = self.options["zero"]
        codes = self.codes.astype(np.int64)
        return codes if zero is None else codes - np.asarray(zero, np.int64)[:, group_index]

    def exact(self):
        """(result, sum of magnitudes), float64."""
        options, k = self.options, self.codes.shape[1]
        index = np.arange(k) // (options["group"] or k)
        weights = self.shifted(index) * np.asarray(options["scale"], float)[:, index]
        x = self.values.astype(float)
        if isinstance(self.x, QuantizedRows):
            x = x * np.asarray(self.x.scale, float)
        y, size = x @ weights.T, np.abs(x) @ np.abs(weights).T
        if options["bias"] is not None:
            y = y + np.asarray(options["bias"], float)
        if options["gate"] is not None:
            gate = np.asarray(options["gate"], float)
            gate = np.repeat(gate, len(y) // len(gate), axis=0)
            y, size = y * gate, size * np.abs(gate)
        if options["residual"] is not None:
            y = y + np.asarray(options["residual"], float)
        return y, size + np.abs(y)


def product(
    format,
    m,
    n,
    k,
    *,
    group=None,
    asymmetric=False,
    integer=True,
    bias=False,
    gates=0,
    residual=False,
    unit_scales=False,
    seed=0,
) -> Product:
    """Random operands over the whole range of a format; activations in -127..127, or normal."""
    rng = np.random.default_rng(seed)
    spec = FORMATS[format]
    groups = -(-k // group) if group else 1
    codes = rng.integers(spec.low, spec.high, (n, k), np.int8, endpoint=True)
    positive = lambda *shape: rng.uniform(0.01, 0.1, shape).astype(np.float32)  # noqa: E731
    scale = np.ones((n, groups), np.float32) if unit_scales else positive(n, groups)
    zero = rng.integers(spec.low, spec.high, (n, groups), np.int8, endpoint=True)
    if integer:
        values = rng.integers(-127, 128, (m, k))
        sums = values.sum(axis=1, keepdims=True).astype(np.int32)
        row_scale = np.ones((m, 1), np.float32) if unit_scales else positive(m, 1)
        x = QuantizedRows(*map(jnp.asarray, (values.astype(np.int8), row_scale, sums)))
    else:
        x = jnp.asarray(rng.standard_normal((m, k)), jnp.bfloat16)
        values = np.asarray(x).astype(float)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)  # noqa: E731
    options = {
        "w": pack_codes(jnp.asarray(codes), format),
        "scale": jnp.asarray(scale),
        "zero": jnp.asarray(zero) if asymmetric else None,
        "format": format,
        "group": group,
        "bias": normal(n) if bias else None,
        "gate": normal(gates, n) if gates else None,
        "residual": normal(m, n) if residual else None,
    }
    return Product(x, options, codes, values)
