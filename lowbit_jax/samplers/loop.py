"""The loop of every diffusion sampler: all of them are linear in what they have seen.

A sampler's file works out coefficients on the host; one `lax.scan` here runs them. Per step

    out  = denoiser(x, timestep)
    data = clip(data_x * x + data_out * out)
    x    = keep * x + push * out + pull * data + pull_before * data_before + std * noise

where `data_before` is the last step's `data`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Key

Denoiser = Callable[[Float[Array, "b c ..."], Array], Float[Array, "b out ..."]]
# what a step hands to the next: x, and the predicted data where the sampler looks back
State = tuple[Float32[Array, "b c ..."], Float32[Array, "b c ..."] | None]


def _static(default: Any = None) -> Any:
    return field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Steps:
    """The coefficients of a run, one entry per step; None leaves a term out of the program.

    Attributes:
        timestep: what the model is told: a training step (int32) or a time (float32).
        keep: of the state.
        push: of the model's output.
        data_x: of the state in the predicted data; `data_out` of the output.
        data_out: see `data_x`.
        pull: of the predicted data.
        pull_before: of the last step's predicted data.
        std: standard deviation of the noise that is added. None for a deterministic sampler.
        log_std_range: how far the model's variance channels, from -1 to 1, raise log(std).
        clip: largest magnitude of the predicted data. Static.
        learned_variance: `std` is multiplied by the square root of the variance channels. Static.
    """

    timestep: Int32[Array, "n"] | Float32[Array, "n"]
    keep: Float32[Array, "n"] | None = None
    push: Float32[Array, "n"] | None = None
    data_x: Float32[Array, "n"] | None = None
    data_out: Float32[Array, "n"] | None = None
    pull: Float32[Array, "n"] | None = None
    pull_before: Float32[Array, "n"] | None = None
    std: Float32[Array, "n"] | None = None
    log_std_range: Float32[Array, "n"] | None = None
    clip: float | None = _static()
    learned_variance: bool = _static(False)

    @staticmethod
    def of(timestep: np.ndarray, **values: Any) -> Steps:
        """Steps from float64 coefficients; the other settings pass through."""
        arrays = {
            name: value.astype(np.float32) if isinstance(value, np.ndarray) else value
            for name, value in values.items()
        }
        return Steps(timestep=timestep, **arrays)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self.timestep.shape[0]


def sample(
    denoiser: Denoiser,
    noise: Float[Array, "b c ..."],
    steps: Steps,
    *,
    key: Key[Array, ""] | None = None,
    step_noise: Float[Array, "n b c ..."] | None = None,
) -> Float32[Array, "b c ..."]:
    """Run a sampler from `noise` to data.

    A pure function and one `lax.scan`: a jitted call compiles the denoiser once whatever the number
    of steps. The state is kept in float32.

    Args:
        denoiser: takes the state and one timestep per batch entry; gives what the schedule's
            `prediction_type` says. With twice the channels of the state, the second half is the
            variance: used by steps with a learned variance, dropped by all others.
        noise: standard normal start.
        steps: from a schedule's `steps`.
        key: source of the noise added in every step, for steps that add any.
        step_noise: that noise itself, in place of `key`.

    Raises:
        ValueError: noise for steps that add none, or not exactly one source for steps that do;
            an output with other than c or 2c channels, or without a variance that is needed.
    """
    if steps.std is None and (key is not None or step_noise is not None):
        raise ValueError("these steps add no noise: give neither `key` nor `step_noise`")
    if steps.std is not None and (key is None) == (step_noise is None):
        raise ValueError("these steps add noise: give either `key` or `step_noise`")
    shape = noise.shape
    if step_noise is not None and step_noise.shape != (len(steps), *shape):
        raise ValueError(f"step_noise has shape {step_noise.shape}, not {(len(steps), *shape)}")
    source = step_noise if key is None else jax.random.split(key, len(steps))

    def step(state, now):
        s, random = now
        z = random if key is None else jax.random.normal(random, shape)
        return advance(denoiser, state, s, z), None

    (x, _), _ = jax.lax.scan(step, start(noise, steps), (steps, source))
    return x


def start(noise: Float[Array, "b c ..."], steps: Steps) -> State:
    """The state before the first step."""
    x = jnp.asarray(noise).astype(jnp.float32)
    return x, None if steps.pull_before is None else jnp.zeros_like(x)


def advance(
    denoiser: Denoiser, state: State, s: Steps, z: Float[Array, "b c ..."] | None = None
) -> State:
    """One step: the body of `sample`, for who wants to see every one.

    Args:
        denoiser: see `sample`.
        state: from `start` or the last `advance`.
        s: one step: every coefficient a scalar.
        z: standard normal noise, for steps that add any.
    """
    x, before = state
    out, variance = _split(denoiser(x, jnp.full(x.shape[:1], s.timestep)), x.shape[1])
    data = _sum((s.data_x, x), (s.data_out, out))
    if s.clip is not None:
        data = jnp.clip(data, -s.clip, s.clip)
    x = _sum((s.keep, x), (s.push, out), (s.pull, data), (s.pull_before, before))
    if s.std is not None:
        x += s.std * _widening(s, variance) * z
    return x, data if before is not None else None


def _split(out: Array, channels: int) -> tuple[Array, Array | None]:
    """Prediction, and variance where the model gives one, in float32."""
    out = out.astype(jnp.float32)
    if out.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"the denoiser gives {out.shape[1]} channels; {channels} channels of state need "
            f"{channels}, or {2 * channels} with a variance"
        )
    return out[:, :channels], out[:, channels:] if out.shape[1] > channels else None


def _sum(*terms: tuple[Array | None, Any]) -> Any:
    """The sum of `coefficient * value` over the terms that have a coefficient."""
    return sum(coefficient * value for coefficient, value in terms if coefficient is not None)


def _widening(s: Steps, variance: Array | None) -> Any:
    """What the model's variance channels multiply `std` by."""
    if s.log_std_range is None and not s.learned_variance:
        return 1.0
    if variance is None:
        raise ValueError("the schedule has a learned variance, and the denoiser gives none")
    if s.log_std_range is None:
        return jnp.sqrt(variance)
    return jnp.exp(s.log_std_range * (variance + 1) / 2)
