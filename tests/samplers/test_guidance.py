"""Guidance against the published formulas, with halves and channels that cannot be mistaken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.samplers.ddim import DIT_SCHEDULE
from lowbit_jax.samplers.guidance import (
    DIT_DIFFUSERS,
    DIT_PUBLISHED,
    LATTE,
    OPENSORA_1_0,
    OPENSORA_1_2,
    PIXART,
    Guidance,
)
from lowbit_jax.samplers.loop import sample

CHANNELS = 4
T = np.array([5.0, 700.0], np.float32)


def x(channels=CHANNELS, seed=0):
    return np.random.default_rng(seed).standard_normal((2, channels, 3, 2), np.float32)


def model(x, t, condition, xp=np):
    """A learned-sigma model: every channel depends on its own state, time and condition."""
    condition, t = (v.reshape(-1, 1, 1, 1) for v in (condition, t))
    factor = xp.arange(1, 1 + 2 * x.shape[1], dtype=xp.float32).reshape(1, -1, 1, 1)
    return xp.concatenate([x, x * x], 1) * condition + factor * condition**2 + t / 1000


CONDITIONAL = np.array([0.3, 0.7], np.float32)
UNCONDITIONAL = np.array([-0.2, -0.5], np.float32)


def guided(guidance, state, scale):
    both = guidance.double(CONDITIONAL, UNCONDITIONAL)
    return np.asarray(guidance.guide(lambda x, t: model(x, t, both, jnp), scale)(state, T))


def published(name, state, scale):
    """Each program's own lines, in NumPy: two forwards, one condition each."""
    conditional, unconditional = (model(state, T, c) for c in (CONDITIONAL, UNCONDITIONAL))
    if name == "facebook":  # three channels; the rest of the conditional half
        eps = unconditional[:, :3] + scale * (conditional[:, :3] - unconditional[:, :3])
        return np.concatenate([eps, conditional[:, 3:]], 1)
    if name == "diffusers":  # all channels of noise; the variance of the conditional half
        eps = unconditional[:, :4] + scale * (conditional[:, :4] - unconditional[:, :4])
        return np.concatenate([eps, conditional[:, 4:]], 1)
    # pixart, opensora: everything guided, then the first half of the channels is kept
    return (unconditional + scale * (conditional - unconditional))[:, :4]


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        ("facebook", DIT_PUBLISHED),
        ("diffusers", DIT_DIFFUSERS),
        ("pixart", PIXART),
        ("facebook", OPENSORA_1_0),  # its code has the same three channels
        ("diffusers", LATTE),  # its code has all four
        ("opensora", OPENSORA_1_2),
    ],
)
def test_guidance_equals_the_published_formulas(name, guidance, scale):
    expected = published(name, x(), scale)
    found = guided(guidance, x(), scale)[:, : expected.shape[1]]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)


def test_the_orders_of_the_halves():
    for guidance in (DIT_PUBLISHED, DIT_DIFFUSERS, OPENSORA_1_2):
        np.testing.assert_array_equal(
            guidance.double(CONDITIONAL, UNCONDITIONAL), [*CONDITIONAL, *UNCONDITIONAL]
        )
    np.testing.assert_array_equal(
        PIXART.double(CONDITIONAL, UNCONDITIONAL), [*UNCONDITIONAL, *CONDITIONAL]
    )


def test_one_forward_of_both_halves_inside_the_loop():
    """And a variance from the model goes through to the sampler, which drops it here."""
    shapes = []
    both = DIT_DIFFUSERS.double(CONDITIONAL, UNCONDITIONAL)

    def counted(x, t):
        shapes.append((x.shape, t.shape))
        return 0.1 * model(x, t, both, jnp)

    steps = DIT_SCHEDULE.steps(20)
    denoiser = DIT_DIFFUSERS.guide(counted, 4.0)
    out = jax.jit(lambda noise: sample(denoiser, noise, steps))(x())
    assert shapes == [((4, CHANNELS, 3, 2), (4,))]
    assert out.shape == (2, CHANNELS, 3, 2) and np.isfinite(out).all()


def test_an_unknown_order_is_named():
    with pytest.raises(ValueError, match="order is 'both', none of: 'conditional first'"):
        Guidance(order="both")
