"""Video sampling against torch networks under diffusers' scheduler and Open-Sora's formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.models.latte import LatteTransformer
from lowbit_jax.models.latte_t2v import LatteT2VTransformer
from lowbit_jax.models.stdit import STDiTTransformer
from lowbit_jax.models.stdit3 import STDiT3Transformer
from lowbit_jax.pipelines import dit as class_to_video
from lowbit_jax.pipelines.video import Shot, sample_latents
from lowbit_jax.samplers import ddim, ddpm
from lowbit_jax.samplers.guidance import LATTE, LATTE_1, OPENSORA_1_0, OPENSORA_1_2
from lowbit_jax.samplers.rectified_flow import OPENSORA_1_2_SCHEDULE
from tests.references import latte_files, latte_t2v_files, stdit3_files, stdit_files
from tests.references.samplers import diffusers_trajectory, generator_noise
from tests.references.video_params import latte_params, stdit3_params, stdit_params

STEPS = 6
SCALE = 4.0
NOISE = np.random.default_rng(2).standard_normal((2, 4, 3, 4, 6), np.float32)
MASK = np.arange(7) < np.array([[4], [7]])
CAPTION = np.random.default_rng(3).standard_normal((2, 7, 24), np.float32)


def config(files, **changes):
    """Four channels: one more than Open-Sora 1.0 guides."""
    return dataclasses.replace(files.TINY, in_channels=4, **changes)


def relative_error(found, expected):
    assert found.shape == expected.shape
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


def tensor(array):
    """A torch tensor that shares nothing."""
    import torch

    return torch.tensor(np.asarray(array))


def guided(run, null, channels):
    """Torch's network by two separate forwards; variance, and what is not guided, of the first."""
    import torch

    def denoise(x, timestep):
        out, without = (
            tensor(run(np.asarray(x), np.asarray(timestep), caption))
            for caption in (CAPTION, np.broadcast_to(null, CAPTION.shape))
        )
        mixed = without + SCALE * (out - without)
        return torch.cat([mixed[:, :channels], out[:, channels:]], 1)

    return denoise


def test_stdit_equals_torch_under_iddpm():
    """Three channels guided; the null caption through the caption's mask."""
    pytest.importorskip("diffusers", reason="the scheduler is diffusers'")
    import diffusers

    from tests.references import stdit

    sizes = config(stdit_files)
    theirs = stdit.torch_stdit(sizes, NOISE.shape[2:])
    state = stdit.state_arrays(theirs)

    def run(x, timestep, caption):
        inputs = {"x": x, "timestep": timestep, "caption": caption, "caption_mask": MASK}
        return stdit.run(theirs, inputs)

    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    scheduler.set_timesteps(STEPS)
    denoise = guided(run, state["y_embedder.y_embedding"], channels=3)
    expected = diffusers_trajectory(scheduler, denoise, NOISE, seed=5)[-1]
    found = sample_latents(
        STDiTTransformer(sizes),
        stdit_params(state, sizes),
        NOISE,
        (CAPTION, MASK),
        ddpm.DIT_SCHEDULE.steps(STEPS),
        guidance=OPENSORA_1_0,
        scale=SCALE,
        step_noise=generator_noise(5, NOISE.shape, STEPS),
    )
    assert relative_error(found, expected) < 5e-5
    assert np.abs(expected - NOISE).max() > 0.1


@pytest.mark.parametrize(
    "made",
    [None, np.array([[False, True, True], [True, True, False]])],
    ids=["all-made", "frames-given"],
)
def test_stdit3_equals_torch_under_rectified_flow(made):
    """All channels guided, the others dropped; Euler steps worked through here, as Open-Sora's with
    a mask of zeros and ones: given frames are modulated as at time 0, and put back every step."""
    pytest.importorskip("torch", reason="the reference is torch")
    from tests.references import stdit3

    sizes = config(stdit3_files)
    theirs = stdit3.torch_stdit3(sizes)
    state = stdit3.state_arrays(theirs)
    height, width, frames, fps = 144, 256, 17, 24
    of_shot = {"fps": fps, "height": height, "width": width}
    numbers = {name: np.full(2, value, np.float32) for name, value in of_shot.items()}

    def run(x, timestep, caption):
        inputs = {"x": x, "timestep": timestep, "caption": caption, "caption_mask": MASK}
        given = {} if made is None else {"frame_mask": made}
        return stdit3.run(theirs, inputs | numbers | given)

    denoise = guided(run, state["y_embedder.y_embedding"], channels=4)
    times = OPENSORA_1_2_SCHEDULE.timesteps(STEPS, height=height, width=width, num_frames=frames)
    z = NOISE
    for now, then in zip(times, [*times[1:], 0.0], strict=True):
        velocity = denoise(z, np.full(2, now, np.float32)).numpy()[:, :4]
        z = z + velocity * np.float32((now - then) / 1000)
        if made is not None:
            z = np.where(made[:, None, :, None, None], z, NOISE)
    found = sample_latents(
        STDiT3Transformer(sizes),
        stdit3_params(state, sizes),
        NOISE,
        (CAPTION, MASK),
        OPENSORA_1_2_SCHEDULE.steps(STEPS, height=height, width=width, num_frames=frames),
        guidance=OPENSORA_1_2,
        scale=SCALE,
        shot=Shot(**of_shot),
        made=made,
    )
    assert relative_error(found, z) < 5e-5
    assert np.abs(z - NOISE).max() > 0.1


def test_latte_1_equals_diffusers_under_ddim():
    """The negative caption is the text encoder's, as it stores none."""
    pytest.importorskip("diffusers", reason="the reference is diffusers")
    import diffusers

    from tests.references import latte_t2v

    sizes = config(latte_t2v_files, num_frames=3)
    theirs = latte_t2v.diffusers_latte(sizes)
    negative = CAPTION[::-1].copy()

    def denoise(x, timestep):
        inputs = {"x": x, "timestep": timestep, "caption_mask": MASK}
        out, without = (
            latte_t2v.run(theirs, inputs | {"caption": caption}) for caption in (CAPTION, negative)
        )
        return tensor(without + SCALE * (out - without))[:, :4]

    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    expected = diffusers_trajectory(scheduler, denoise, NOISE)[-1]
    options = {"guidance": LATTE_1, "scale": SCALE}
    arguments = (
        LatteT2VTransformer(sizes),
        latte_t2v.params_of(theirs, sizes),
        NOISE,
        (CAPTION, MASK),
        ddim.DIT_SCHEDULE.steps(STEPS),
    )
    found = sample_latents(*arguments, **options, negative=(negative, MASK))
    assert relative_error(found, expected) < 5e-5
    with pytest.raises(ValueError, match="this network stores no null caption"):
        sample_latents(*arguments, **options)
    with pytest.raises(ValueError, match="LatteT2VTransformer was given shot: STDiT3 needs"):
        sample_latents(*arguments, **options, negative=(negative, MASK), shot=Shot(24, 64, 64))


def test_latte_takes_dits_door():
    """Class to video: all channels guided."""
    pytest.importorskip("diffusers", reason="the scheduler is diffusers'")
    import diffusers

    from tests.references import latte

    sizes = config(latte_files)
    theirs = latte.torch_latte(sizes)
    labels = np.array([3, 7], np.int32)
    noise = np.random.default_rng(4).standard_normal((2, *sizes.latents), np.float32)

    def denoise(x, timestep):
        out, without = (
            latte.run(theirs, {"x": x, "timestep": timestep, "labels": given})
            for given in (labels, np.full_like(labels, sizes.num_classes))
        )
        mixed = without[:, :4] + SCALE * (out[:, :4] - without[:, :4])
        return tensor(np.concatenate([mixed, out[:, 4:]], 1))

    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    scheduler.set_timesteps(STEPS)
    expected = diffusers_trajectory(scheduler, denoise, noise, seed=5)[-1]
    found = class_to_video.sample_latents(
        LatteTransformer(sizes),
        latte_params(latte.state_arrays(theirs), sizes),
        noise,
        labels,
        ddpm.DIT_SCHEDULE.steps(STEPS),
        scale=SCALE,
        guidance=LATTE,
        step_noise=generator_noise(5, noise.shape, STEPS),
    )
    assert relative_error(found, expected) < 5e-5


def test_a_shot_is_needed_by_stdit3_alone():
    model = STDiT3Transformer(config(stdit3_files))
    steps = OPENSORA_1_2_SCHEDULE.steps(2, height=64, width=64, num_frames=1)
    params = jax.eval_shape(lambda: {"y_embedder": {}})
    with pytest.raises(ValueError, match="STDiT3Transformer was given no shot: STDiT3 needs"):
        sample_latents(
            model, params, jnp.asarray(NOISE), (CAPTION, MASK), steps, guidance=OPENSORA_1_2
        )
