"""Readings of one forward against NumPy float64, for every kind of network."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.calibration.observe import iter_readings, observe
from lowbit_jax.models import dit, flux, latte_t2v, pixart, stdit3
from lowbit_jax.models.layers import BlockStack
from lowbit_jax.quant.recipe import RECIPES
from lowbit_jax.quant.stacks import layer_paths
from lowbit_jax.quant.transform import quantize
from tests.references import dit_files, flux_files, latte_t2v_files, pixart_files, stdit3_files
from tests.references.calibration import linear_inputs, random_params

ENTRIES = 2
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal((ENTRIES, *shape), np.float32)


TIMES = np.float32([3.0, 700.0])
MASK = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], np.int32)


@functools.cache
def case(name):
    """(module, params, inputs of batch 2, keyword inputs)."""
    named = {}
    if name == "flux":
        config = flux_files.TINY
        model = flux.FluxTransformer(config)
        guidance = np.float32([3.5, 2.0]) if config.guidance_embed else None
        inputs = (normal(6, config.in_channels), normal(5, config.context_in_dim))
        inputs += (np.float32([0.2, 0.9]), normal(config.vec_in_dim))
        named = {"img_ids": flux.image_ids(2, 3), "txt_ids": flux.text_ids(5), "guidance": guidance}
    elif name == "dit":
        config = dit_files.TINY
        model = dit.DiTTransformer(config)
        side = config.sample_size
        inputs = (normal(config.in_channels, side, side), TIMES, np.int32([0, 2]))
    elif name == "pixart":  # micro-conditions: two rows of one embedder for each sample
        config = dataclasses.replace(pixart_files.TINY, compressed_layers=(2,))
        model = pixart.PixArtTransformer(config)
        inputs = (normal(config.in_channels, 4, 6), TIMES, normal(4, config.caption_channels))
        inputs += (MASK, np.float32([[32, 48], [64, 20]]), np.float32([0.7, 3.2]))
    elif name == "latte-t2v":
        config = latte_t2v_files.TINY
        model = latte_t2v.LatteT2VTransformer(config)
        inputs = (normal(config.in_channels, 3, 4, 6), TIMES, normal(4, config.caption_channels))
        inputs += (MASK,)
    else:  # some frames given: two times for each video
        config = stdit3_files.TINY
        model = stdit3.STDiT3Transformer(config)
        pt, *_ = config.patch_size
        inputs = (normal(config.in_channels, 3 * pt, 4, 6), TIMES)
        inputs += (normal(4, config.caption_channels), MASK)
        inputs += (np.float32([24, 8]), np.float32([32, 64]), np.float32([48, 80]))
        if name == "stdit3-given":
            named = {"frame_mask": np.array([[0, 1, 1], [1, 1, 0]], bool)}
    return model, random_params(model, *inputs, **named), inputs, named


SLOW = ("flux", "pixart", "latte-t2v", "stdit3-given")  # op by op, for the reference


def read(model, params, inputs, named, **settings):
    """{layer path: readings of its calls} of a jitted forward, and its output."""

    @jax.jit
    def forward(params, inputs, named):
        apply, readings = observe(model, params, entries=ENTRIES, **settings)
        out = apply(*inputs, **named)
        return out, readings()

    out, tree = forward(params, inputs, named)
    return dict(iter_readings(jax.device_get(tree))), out


def entry(e, inputs, named):
    """The inputs of one entry of the batch."""
    one = lambda x: x[e : e + 1]  # noqa: E731
    apart = {key: named[key] for key in named if key.endswith("ids")}
    return tuple(map(one, inputs)), jax.tree.map(one, named) | apart


@pytest.mark.parametrize(
    "name",
    ["dit", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)],
)
def test_readings_are_those_of_each_entry_alone(name):
    """Each entry's rows from a forward of its own, so that none can be another's."""
    model, params, inputs, named = case(name)
    found, _ = read(model, params, inputs, named)
    assert sorted(found) == sorted(layer_paths(params))
    for e in range(ENTRIES):
        one, rest = entry(e, inputs, named)
        for path, calls in linear_inputs(model, params, *one, **rest).items():
            assert len(calls) == len(found[path]) == 1, path
            rows, reading = calls[0], found[path][0]
            assert reading.count == len(rows), path
            close = functools.partial(np.testing.assert_allclose, rtol=2e-4, err_msg=path)
            close(reading.absmax[e], np.abs(rows).max(0), atol=2e-5 * np.abs(rows).max())
            close(reading.total[e], rows.sum(0), atol=2e-5 * np.abs(rows).sum(0).max())
            close(reading.squares[e], (rows**2).sum(0), atol=2e-5 * (rows**2).sum(0).max())


def test_grams_of_chosen_linears_only():
    model, params, inputs, named = case("dit")
    found, _ = read(model, params, inputs, named, grams=r"blocks/1/mlp/fc2|final_layer/linear")
    having = {path for path, calls in found.items() if calls[0].gram is not None}
    stack = {path for path in found if path.startswith("blocks/") and path.endswith("mlp/fc2")}
    assert having == stack | {"final_layer/linear"} and len(stack) > 1
    everything = linear_inputs(model, params, *inputs, **named)
    for path in having:
        (rows,) = everything[path]
        expected = rows.T @ rows
        error = np.abs(found[path][0].gram - expected).max()
        assert error < 2e-5 * np.abs(expected).max(), path


@pytest.mark.parametrize("name", ["flux", "pixart"])
def test_the_output_is_that_of_a_plain_forward(name):
    model, params, inputs, named = case(name)
    _, out = read(model, params, inputs, named)
    plain = jax.jit(lambda p: model.apply({"params": p}, *inputs, **named))(params)
    np.testing.assert_allclose(out, plain, rtol=1e-4, atol=1e-5 * np.abs(plain).max())


class PlainStack(BlockStack):
    """The loop as it would be if nothing could ever come out of it."""

    def __call__(self, carry, *constants, layers=None):
        assert layers is None
        segments = self.variables["params"]
        for first in sorted(segments, key=int):
            block = self.make_block(int(first))

            def step(carry, params, block=block):
                return block.apply({"params": params}, *carry, *constants), None

            carry, _ = jax.lax.scan(step, carry, segments[first])
        return carry


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_a_plain_forward_is_the_program_it_was(monkeypatch, name):
    model, params, inputs, named = case(name)

    def text():
        forward = lambda p: model.apply({"params": p}, *inputs, **named)  # noqa: E731
        return jax.jit(forward).lower(params).as_text()

    before = text()
    read(model, params, inputs, named)
    assert text() == before
    monkeypatch.setattr({"dit": dit, "flux": flux}[name], "BlockStack", PlainStack)
    assert text() == before


def test_the_program_does_not_grow_with_depth():
    def lines(depth):
        model = dit.DiTTransformer(dataclasses.replace(dit_files.TINY, depth=depth))
        _, _, inputs, _ = case("dit")
        params = random_params(model, *inputs)

        def forward(params):
            apply, readings = observe(model, params, entries=ENTRIES)
            return apply(*inputs), readings()

        return len(jax.jit(forward).lower(params).as_text().splitlines())

    assert lines(9) == lines(2)


def test_remat_changes_nothing():
    model, params, inputs, named = case("dit")
    plain, _ = read(model, params, inputs, named)
    remat, _ = read(model.clone(remat=True), params, inputs, named)
    for path in plain:
        np.testing.assert_allclose(plain[path][0].squares, remat[path][0].squares, rtol=1e-5)


def test_bfloat16_is_read_in_float32():
    """AdaLN of a bfloat16 input: not rounded again before it is read."""
    model, params, inputs, named = case("dit")
    found, _ = read(model.clone(dtype=jnp.bfloat16), params, inputs, named)
    top = np.stack([found[f"blocks/{i}/attn/qkv"][0].absmax for i in range(2)])
    assert top.dtype == np.float32
    assert (top.astype(jnp.bfloat16).astype(np.float32) != top).mean() > 0.9


def test_a_quantised_model_is_read_too():
    model, params, inputs, named = case("dit")
    found, _ = read(model, quantize(params, RECIPES["w8a8"]), inputs, named)
    plain, _ = read(model, params, inputs, named)
    assert found.keys() == plain.keys()
    for path in found:
        ours, theirs = found[path][0].squares, plain[path][0].squares
        assert np.abs(ours - theirs).max() < 0.1 * theirs.max(), path


def test_a_batch_that_is_not_the_entries_is_refused():
    model, params, inputs, named = case("dit")
    apply, _ = observe(model, params, entries=3)
    with pytest.raises(ValueError, match="x_embedder/proj: .*no multiple of the 3 entries"):
        apply(*inputs)
