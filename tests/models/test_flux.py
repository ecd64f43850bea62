"""FLUX against diffusers' own model; its exact size; programs that do not grow with depth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.models.flux import (
    FLUX_DEV,
    FLUX_SCHNELL,
    FluxConfig,
    FluxTransformer,
    abstract_params,
    image_ids,
    text_ids,
)

TINY = FluxConfig(
    in_channels=8,
    vec_in_dim=12,
    context_in_dim=20,
    hidden_size=64,
    num_heads=2,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(8, 12, 12),
)


def tiny(**changes):
    return dataclasses.replace(TINY, **changes)


def errors(config, **shapes):
    """Relative errors against diffusers in float32, same weights: (at usual times, at time 0)."""
    pytest.importorskip("diffusers", reason="the reference is diffusers")
    from tests.references.flux import diffusers_flux, flux_inputs, flux_params, run_flux

    theirs = diffusers_flux(config)
    usual = flux_inputs(config, **shapes)
    times = {name: 0 * usual[name] for name in ("timestep", "guidance") if name in usual}
    cases = [usual, usual | times]
    expected = [run_flux(theirs, inputs) for inputs in cases]
    params = flux_params(dict(theirs.state_dict()), config)
    del theirs
    params = jax.tree.map(jnp.asarray, params)
    apply = jax.jit(FluxTransformer(config).apply)
    outputs = [np.asarray(apply({"params": params}, **inputs)) for inputs in cases]
    return [relative_error(*pair) for pair in zip(outputs, expected, strict=True)]


def relative_error(out, expected):
    assert out.shape == expected.shape
    return np.abs(out - expected).max() / np.abs(expected).max()


# Both sum in float32, in different orders: 1e-6 measured over five blocks. At times other than 0
# comes the embedding: frequencies in float32, rounded by other means, times 1000 * 4 move angles by
# 2e-4 (1.4e-5 of the output measured).
AT_ZERO, AT_USUAL = 4e-6, 5e-5


@pytest.mark.parametrize(
    ("changes", "shapes"),
    [
        pytest.param({}, {}, id="dev"),
        pytest.param({"guidance_embed": False}, {}, id="schnell"),
        pytest.param({"num_heads": 4, "axes_dim": (4, 4, 8)}, {"batch": 3}, id="heads-axes-batch"),
        pytest.param({"axes_dim": (16, 6, 10)}, {"height": 6, "width": 2}, id="uneven-axes-tall"),
        pytest.param({"depth": 0}, {"batch": 1}, id="single-blocks-only"),
        pytest.param({"depth_single_blocks": 0}, {"text": 1}, id="double-blocks-only"),
        pytest.param(
            {"depth": 1, "depth_single_blocks": 1}, {"height": 1, "width": 1}, id="one-each"
        ),
    ],
)
def test_float32_output_equals_diffusers(changes, shapes):
    usual, zero = errors(tiny(**changes), **shapes)
    assert zero < AT_ZERO
    assert usual < AT_USUAL


@pytest.mark.slow
def test_full_width_blocks_equal_diffusers():
    """One block of each kind at FLUX.1's own width, heads and input sizes: 0.6e9 parameters."""
    config = dataclasses.replace(FLUX_DEV, depth=1, depth_single_blocks=1)
    usual, zero = errors(config, batch=1, height=6, width=4, text=16)
    assert zero < AT_ZERO
    assert usual < AT_USUAL


def test_bfloat16_is_as_close_to_float32_as_diffusers_bfloat16():
    """8 bits, and the roundings of 5 blocks: about 1 %. Ours must not be the coarser one."""
    pytest.importorskip("diffusers", reason="the reference is diffusers")
    import torch

    from tests.references.flux import diffusers_flux, flux_inputs, flux_params, run_flux

    theirs = diffusers_flux(TINY).to(torch.bfloat16).float()  # weights that bfloat16 holds exactly
    inputs = flux_inputs(TINY)
    inputs |= {name: rounded(inputs[name]) for name in ("img", "txt", "pooled")}
    exact = run_flux(theirs, inputs)
    params = flux_params({k: v.clone() for k, v in theirs.state_dict().items()}, TINY)
    coarse = run_flux(theirs.to(torch.bfloat16), inputs)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    out = jax.jit(FluxTransformer(TINY, jnp.bfloat16).apply)({"params": params}, **inputs)
    assert out.dtype == jnp.bfloat16
    ours, diffusers = (
        np.sqrt(np.mean((np.asarray(x, np.float32) - exact) ** 2)) for x in (out, coarse)
    )
    scale = np.sqrt(np.mean(exact**2))
    assert ours < 0.02 * scale
    assert ours < 1.5 * diffusers


def rounded(x):
    return np.asarray(x.astype(jnp.bfloat16), np.float32)


def random_params(config, seed=0):
    """A tree of our own with nothing at zero, for checks that need no reference."""
    leaves, tree = jax.tree.flatten(abstract_params(config, jnp.float32))
    rng = np.random.default_rng(seed)
    return tree.unflatten([0.2 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])


def example(config, batch=2, height=3, width=5, text=7):
    rng = np.random.default_rng(1)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    args = {
        "img": normal(batch, height * width, config.in_channels),
        "txt": normal(batch, text, config.context_in_dim),
        "timestep": np.linspace(0.2, 0.9, batch, dtype=np.float32),
        "pooled": normal(batch, config.vec_in_dim),
        "img_ids": image_ids(height, width),
        "txt_ids": text_ids(text),
    }
    return args | ({"guidance": np.full(batch, 3.5, np.float32)} if config.guidance_embed else {})


def test_ids_are_rows_and_columns():
    assert image_ids(2, 3).tolist() == [
        [0, 0, 0], [0, 0, 1], [0, 0, 2],
        [0, 1, 0], [0, 1, 1], [0, 1, 2],
    ]  # fmt: skip
    assert text_ids(2).tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("embeds", (True, False))
def test_guidance_missing_or_unexpected_raises(embeds):
    config = tiny(guidance_embed=embeds)
    inputs = example(config)
    if embeds:
        del inputs["guidance"]
    else:
        inputs["guidance"] = np.ones(2, np.float32)
    word = "needs" if embeds else "has no embedder for"
    with pytest.raises(ValueError, match=f"{word} `guidance` .guidance_embed={embeds}"):
        FluxTransformer(config).apply({"params": random_params(config)}, **inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "hidden_size 64 is not a multiple of num_heads 5"),
        ({"axes_dim": (8, 12, 14)}, r"\(8, 12, 14\) must be even and sum to the head dim 32"),
        ({"axes_dim": (9, 11, 12)}, r"\(9, 11, 12\) must be even"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@pytest.mark.parametrize(
    ("config", "count"), [(FLUX_DEV, 11_901_408_320), (FLUX_SCHNELL, 11_891_178_560)]
)
def test_parameter_counts_are_those_of_the_published_models(config, count):
    """Counted from Black Forest Labs' files; nothing is allocated."""
    params = abstract_params(config)
    leaves = jax.tree.leaves(params)
    assert sum(leaf.size for leaf in leaves) == count
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}


def test_full_model_traces_to_the_shape_of_its_input():
    """1024 x 1024 pixels are 4096 tokens of 64 channels, next to 512 text tokens."""
    shape = jax.ShapeDtypeStruct
    f32 = jnp.float32
    out = jax.eval_shape(
        FluxTransformer(FLUX_DEV, jnp.bfloat16).apply,
        {"params": abstract_params(FLUX_DEV)},
        img=shape((2, 4096, 64), f32),
        txt=shape((2, 512, 4096), f32),
        timestep=shape((2,), f32),
        pooled=shape((2, 768), f32),
        img_ids=image_ids(64, 64),
        txt_ids=text_ids(512),
        guidance=shape((2,), f32),
    )
    assert (out.shape, out.dtype) == ((2, 4096, 64), jnp.bfloat16)


def test_the_program_does_not_grow_with_depth():
    def length(depth, singles):
        config = tiny(depth=depth, depth_single_blocks=singles)
        params = {"params": abstract_params(config, jnp.float32)}
        return len(
            jax.jit(FluxTransformer(config).apply).lower(params, **example(config)).as_text()
        )

    assert length(4, 8) == pytest.approx(length(2, 4), rel=0.02)


def test_remat_recomputes_both_kinds_of_blocks():
    def recomputed(remat):
        model = FluxTransformer(TINY, remat=remat)
        params = {"params": abstract_params(TINY, jnp.float32)}
        return str(jax.make_jaxpr(model.apply)(params, **example(TINY))).count("prevent_cse")

    assert (recomputed(False), recomputed(True)) == (0, 2)


def test_remat_gives_the_same_gradients_from_less_memory():
    """Recomputed activations are the same numbers; 1e-6 allows for another fusion of the sums."""
    config = tiny(depth=0, depth_single_blocks=8)  # single blocks alone: half the compilation
    params, inputs = random_params(config), example(config, height=8, width=8)

    def compiled(remat):
        model = FluxTransformer(config, remat=remat)
        loss = lambda p: jnp.mean(jnp.square(model.apply({"params": p}, **inputs)))  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(params).compile()

    plain, remat = compiled(False), compiled(True)
    expected, found = plain(params), remat(params)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-6 * np.abs(a).max(), err_msg=name)
        assert np.abs(a).max() > 0, name
    temp = [program.memory_analysis().temp_size_in_bytes for program in (plain, remat)]
    assert temp[1] < 0.5 * temp[0], temp
