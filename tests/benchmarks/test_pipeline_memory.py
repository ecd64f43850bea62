"""The memory of a pipeline: its programs and arithmetic anywhere; compiled where that can be."""

from dataclasses import replace

import jax
import pytest

from benchmarks.pipeline_memory import Need, Options, Sizes, need, stages, totals
from lowbit_jax.models.autoencoder_kl import FLUX_VAE
from lowbit_jax.models.clip_text import CLIP_L
from lowbit_jax.models.flux import FluxConfig
from lowbit_jax.models.t5 import T5_XXL
from lowbit_jax.quant.qtensor import tree_bytes
from pallas_kernels.audit.compile import ToolError, check_tools

pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")

SMALL = Sizes(
    clip=replace(CLIP_L, hidden_size=64, num_attention_heads=4, num_hidden_layers=1),
    t5=replace(T5_XXL, d_model=128, d_ff=256, num_heads=4, num_layers=1, vocab_size=256),
    flux=FluxConfig(
        in_channels=64,
        vec_in_dim=64,
        context_in_dim=128,
        hidden_size=128,
        num_heads=2,
        depth=1,
        depth_single_blocks=1,
        axes_dim=(16, 24, 24),
    ),
    vae=replace(FLUX_VAE, block_out_channels=(32, 64), layers_per_block=1),
)
OPTIONS = Options(pixels=32, tokens=16)


def test_the_programs_go_from_one_to_the_next():
    """What a stage gives is what the next takes, in shape; the last gives pixels."""
    clip, t5, modulation, flux, vae = all_stages = stages(OPTIONS, SMALL)
    out = {s.part: jax.eval_shape(s.run, s.params, *s.inputs) for s in all_stages}
    like = lambda leaf: (leaf.shape, leaf.dtype)  # noqa: E731
    assert like(out[clip.part]) == like(modulation.inputs[1])
    assert like(out[t5.part]) == like(flux.inputs[1])
    steps = jax.tree.map(lambda leaf: (OPTIONS.steps, *leaf.shape), flux.inputs[3])
    assert steps == jax.tree.map(lambda leaf: leaf.shape, out[modulation.part])
    assert out[flux.part].shape == flux.inputs[0].shape == vae.inputs[0].shape == (1, 64, 64)
    assert out[vae.part].shape == (1, 32, 32, 3)


def test_published_sizes_hold_the_published_weights():
    """From shapes: CLIP-L and the autoencoder in bfloat16, T5-XXL and FLUX.1-dev as asked for."""
    weights = [tree_bytes(stage.params) for stage in stages(Options())]
    clip, t5, modulation, flux, vae = weights
    assert (clip, t5, vae) == (2 * 123_060_480, 4_898_041_856, 2 * 83_819_683)
    assert modulation + flux == 3_105_056_896 and 0.27 < modulation / (modulation + flux) < 0.3


def test_one_part_at_a_time_or_all():
    needs = {"a": Need(weights=5, call=1), "b": Need(weights=3, call=4)}
    assert totals(needs) == (7, 12)


def test_a_compiled_stage_needs_its_weights_and_little_more():
    try:
        check_tools()
    except ToolError as error:
        pytest.skip(str(error))
    stage = stages(OPTIONS, SMALL)[1]
    found = need(stage, "a10")
    assert found.weights == tree_bytes(stage.params) and 0 < found.call < 4 << 20
