"""Weight quantisers: w (n, k) to integer codes and scales with w ~ scale * (codes - zero).

Every public function takes `w: float[n, k]` in PyTorch's orientation, computes in float32, and
returns `(codes int8[n, k], scale float32[n, g], zero int8[n, g] | None)`. Granularity:
* neither argument: one scale per output channel, g = 1;
* `group`: one per `group` consecutive inputs, g = ceil(k / group); the last group may be shorter;
* `per_tensor`: one in all, shape (1, 1).

Rounding is half to even. A segment (what shares a scale) whose largest magnitude is below 2**-118
counts as zero: scale 1, codes 0, zero point 0. One that holds NaN or inf gets scale NaN or inf, so
that the damage shows. All are pure and work under `jit`, `vmap` and `eval_shape`; outside `jit`
they are slow. They raise `ValueError` for a w that is no floating matrix, or is empty, for a group
below 1, for a group together with `per_tensor`, and for bits outside [2, 8].
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int8

from lowbit_jax.quant.segments import Segments, cut

HISTOGRAM_FROM = 1024  # shorter segments are sorted: the histogram would be larger than they are
ROWS_AT_ONCE = 256  # rows whose histograms are in memory together

Codes = tuple[Int8[Array, "n k"], Float32[Array, "n g"], Int8[Array, "n g"] | None]


def absmax(w: Float[Array, "n k"], bits=8, *, group=None, per_tensor=False) -> Codes:
    """Symmetric integers: scale = max|w| / qmax, codes in [-qmax, qmax], no zero point.

    Bound qmax = 2**(bits - 1) - 1, that is 127, 31, 7 for 8, 6, 4 bits, as ViDiT-Q and torch have
    it (qwix: 127.5). Source: ViDiT-Q (v2 code), BaseQuantizer with sym.
    """
    seg = cut(w, group, per_tensor)
    return _encode_integer(seg, *_integer_grid(seg, bits, True), symmetric=True)


def minmax(w: Float[Array, "n k"], bits=8, *, group=None, per_tensor=False) -> Codes:
    """Asymmetric integers over [min(w, 0), max(w, 0)], with an integer zero point.

    scale = (max - min) / (2**bits - 1), zero = -2**(bits - 1) - round(min / scale); codes and zero
    lie in [-2**(bits - 1), 2**(bits - 1) - 1], and w = 0 is met exactly. Source: ViDiT-Q (v2 code),
    BaseQuantizer without sym, with zero = -zp and codes clipped to the range that bits can store.
    """
    seg = cut(w, group, per_tensor)
    return _encode_integer(seg, *_integer_grid(seg, bits, False), symmetric=False)


def mse(
    w: Float[Array, "n k"], bits=8, *, group=None, per_tensor=False, symmetric=True, steps=48
) -> Codes:
    """Integers with the range clipped for least squares; never worse than `absmax` or `minmax`.

    Tries the scale of those times 2**(-i / 12), i < steps (48: down to 1/16), then thrice takes
    the least-squares scale for the codes of the best, and codes for that scale. Own choice of
    grid; the zero point of the full range serves all of it, as min / scale does not change.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    seg = cut(w, group, per_tensor)
    full, low, high, zero = _integer_grid(seg, bits, symmetric)

    def encode(scale):
        return jnp.clip(jnp.round(seg.values / scale), low - zero, high - zero)

    def keep_better(i, best):
        trial = full * jnp.exp2(-i / 12.0)
        error = _sum(jnp.square(seg.values - trial * encode(trial)))
        return jnp.where(error < best[1], trial, best[0]), jnp.minimum(error, best[1])

    def refit(scale):
        q = encode(scale)
        rest = seg.values - scale * q  # small: correcting by it loses no digits
        return scale + _sum(rest * q) / jnp.maximum(_sum(q * q), 1)

    scale, _ = lax.fori_loop(0, steps, keep_better, (full, jnp.full_like(full, jnp.inf)))
    scale = lax.fori_loop(0, 2, lambda _, s: refit(s), scale)
    codes, _, zeros = _encode_integer(seg, scale, low, high, zero, symmetric=symmetric)
    return codes, seg.scales(refit(scale)), zeros


def absmean(w: Float[Array, "n k"], *, group=None, per_tensor=False, refit=False) -> Codes:
    """Ternary as BitNet b1.58: scale = mean|w|, codes = clip(round(w / scale), -1, 1).

    The paper's scale is per tensor (pass `per_tensor=True`). `refit` keeps the codes and takes
    the least-squares scale <w, codes> / <codes, codes>: 0.9 dB on Gaussian weights. Source: Ma et
    al. 2024, "The Era of 1-bit LLMs", eq. 1-3 (whose epsilon the rule for zero replaces).
    """
    seg = cut(w, group, per_tensor)
    mags = jnp.abs(seg.values)
    mean = _sum(mags) / seg.entries
    keep = mags / mean > 0.5  # one half rounds to even, which is 0
    return _encode_ternary(seg, keep, _mean_over(mags, keep) if refit else mean)


def twn(w: Float[Array, "n k"], *, group=None, per_tensor=False, factor=0.7) -> Codes:
    """Ternary weight networks: codes = sign(w) where |w| > factor * mean|w|, scale = mean|w| there.

    Source: Li et al. 2016, "Ternary Weight Networks" (the threshold for normal weights).
    """
    seg = cut(w, group, per_tensor)
    mags = jnp.abs(seg.values)
    keep = mags > factor * _sum(mags) / seg.entries
    return _encode_ternary(seg, keep, _mean_over(mags, keep))


def least_squares(w: Float[Array, "n k"], *, group=None, per_tensor=False) -> Codes:
    """Ternary, the exact minimum of ||w - scale * codes||**2 over scale and codes, by sorting.

    With magnitudes sorted downwards, the best support is the first j = argmax (sum_{i <= j}
    |w|_i)**2 / j and the scale their mean: for a given j, no other support or scale is better.
    """
    seg = cut(w, group, per_tensor)
    mags = jnp.abs(seg.values)
    return _encode_threshold(seg, mags, _sorted_threshold(mags))


def least_squares_fast(w: Float[Array, "n k"], *, group=None, per_tensor=False) -> Codes:
    """Ternary, `least_squares` by histogram: the same optimum for bfloat16 w, in a third the time.

    The histogram has a bin per bfloat16 magnitude, so for bfloat16 it sees every support there
    is. For wider types the support found is at most 2**-14 short of the optimum in ||scale *
    codes||**2 (two supports that differ only inside a bin), and two steps of
    `least_squares_fixed_point` then improve it. Segments shorter than 1024 are sorted.
    """
    seg = cut(w, group, per_tensor)
    mags = jnp.abs(seg.values)
    if mags.shape[-1] < HISTOGRAM_FROM:
        return _encode_threshold(seg, mags, _sorted_threshold(mags))
    rows = mags.reshape(-1, mags.shape[-1])
    threshold = lax.map(_histogram_threshold, rows, batch_size=ROWS_AT_ONCE)
    threshold = threshold.reshape(*mags.shape[:2], 1)
    steps = 0 if w.dtype == jnp.bfloat16 else 2
    return _encode_threshold(seg, mags, _iterate(mags, threshold, steps))


def least_squares_fixed_point(
    w: Float[Array, "n k"], *, group=None, per_tensor=False, iterations=10
) -> Codes:
    """Ternary by alternation: support = |w| >= scale / 2, scale = mean|w| over it, and again.

    Starts from 0.7 mean|w|. No step makes the error larger, but it may end in a fixed point that
    is not the optimum: one outlier above twice the rest is one, for instance.
    """
    seg = cut(w, group, per_tensor)
    mags = jnp.abs(seg.values)
    return _encode_threshold(seg, mags, _iterate(mags, 0.7 * _sum(mags) / seg.entries, iterations))


def _sum(x: Array) -> Array:
    return jnp.sum(x, axis=-1, keepdims=True)


def _mean_over(mags: Array, keep: Array) -> Array:
    count = _sum(keep.astype(jnp.float32))
    return _sum(jnp.where(keep, mags, 0)) / jnp.maximum(count, 1)


def _integer_grid(seg: Segments, bits: int, symmetric: bool) -> tuple[Array, int, int, Array]:
    """Scale, smallest and largest code and zero point of the range that clips nothing."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be in [2, 8], got {bits}")
    half = 2 ** (bits - 1)
    if symmetric:
        scale = jnp.max(jnp.abs(seg.values), axis=-1, keepdims=True) / (half - 1)
        return scale, 1 - half, half - 1, jnp.zeros_like(scale)
    low = jnp.minimum(jnp.min(seg.values, axis=-1, keepdims=True), 0)
    high = jnp.maximum(jnp.max(seg.values, axis=-1, keepdims=True), 0)
    scale = (high - low) / (2 * half - 1)
    return scale, -half, half - 1, -half - jnp.round(low / scale)


def _encode_integer(seg: Segments, scale: Array, low: int, high: int, zero: Array, *, symmetric):
    codes = jnp.clip(jnp.round(seg.values / scale) + zero, low, high)
    return seg.codes(codes), seg.scales(scale), None if symmetric else seg.zeros(zero)


def _encode_ternary(seg: Segments, keep: Array, scale: Array) -> Codes:
    return seg.codes(jnp.where(keep, jnp.sign(seg.values), 0)), seg.scales(scale), None


def _encode_threshold(seg: Segments, mags: Array, threshold: Array) -> Codes:
    keep = mags >= threshold
    return _encode_ternary(seg, keep, _mean_over(mags, keep))


def _iterate(mags: Array, threshold: Array, steps: int) -> Array:
    def step(_, threshold):
        return _mean_over(mags, mags >= threshold) / 2

    return lax.fori_loop(0, steps, step, threshold)


def _sorted_threshold(mags: Array) -> Array:
    """The smallest magnitude of the best support, f32[r, g, s] to f32[r, g, 1]."""
    # the bits of non-negative floats sort like the floats, and on a CPU four times as fast
    bits = jnp.sort(lax.bitcast_convert_type(mags, jnp.int32), axis=-1)
    values = lax.bitcast_convert_type(bits, jnp.float32)
    total = lax.cumsum(values, axis=values.ndim - 1, reverse=True)
    count = jnp.arange(mags.shape[-1], 0, -1, dtype=jnp.float32)
    best = jnp.argmax(total * total / count, axis=-1, keepdims=True)
    return jnp.take_along_axis(values, best, axis=-1)


def _histogram_threshold(mags: Float32[Array, "s"]) -> Float32[Array, ""]:
    """The lower edge of the lowest bin of the best support that does not split a bin.

    A bin is the upper half of a float's bits, 128 bins to the octave. The best support is
    |w| >= scale / 2 and its scale at least mean|w|, so nothing below mean / 2 needs a bin.
    """
    size = mags.shape[0]
    bits = lax.bitcast_convert_type(mags, jnp.int32)
    first = (lax.bitcast_convert_type(jnp.mean(mags) / 2, jnp.int32) >> 16) - 2
    bins = 128 * ((size - 1).bit_length() + 1) + 4  # up to max|w| <= size * mean
    shift = max(0, size.bit_length() - 15)  # sums of the 16 lower bits must stay below 2**31
    slot = jnp.clip((bits >> 16) - first, 0, bins - 1)
    entry = jnp.stack([jnp.ones_like(bits), (bits & 0xFFFF) >> shift], axis=-1)
    tally = jnp.zeros((bins, 2), jnp.int32).at[slot].add(entry, mode="promise_in_bounds")
    count, rest = tally.astype(jnp.float32).T  # exact integers: any order of adding gives the same
    edge_bits = (first + jnp.arange(bins)) << 16
    edge = lax.bitcast_convert_type(edge_bits, jnp.float32)
    octave = lax.bitcast_convert_type(edge_bits & 0x7F800000, jnp.float32)
    above = lax.cumsum(
        jnp.stack([count, count * edge + rest * octave * 2.0 ** (shift - 23)]), 1, True
    )
    gain = jnp.square(above[1]) / jnp.maximum(above[0], 1)
    return edge[1 + jnp.argmax(gain[1:])]  # bin 0 also holds everything below it
