"""Classifier-free guidance (Ho & Salimans 2022) with both halves in one forward of batch 2b.

Activations have a scale per row, so that a quantised model needs no split into two forwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from lowbit_jax.samplers.loop import Denoiser
from lowbit_jax.samplers.settings import require

ORDERS = ("conditional first", "unconditional first")


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How a published sampler guides.

    Attributes:
        order: which half of the batch of 2b comes first.
        channels: how many channels, from the first, are guided; None for all of the prediction's.
            The others, and a learned variance, are those of the conditional half.
    """

    order: str = "conditional first"
    channels: int | None = None

    def __post_init__(self) -> None:
        require("order", self.order, ORDERS)

    def double(
        self, conditional: Float[Array, "b ..."], unconditional: Float[Array, "b ..."]
    ) -> Float[Array, "2b ..."]:
        """Both conditions as one batch, in `order`."""
        first = self.order == "conditional first"
        halves = (conditional, unconditional) if first else (unconditional, conditional)
        return jnp.concatenate(halves)

    def guide(self, denoiser: Denoiser, scale: Float[Array, ""] | float) -> Denoiser:
        """A denoiser of b entries from one of 2b, whose conditions are in the order of `double`.

        The prediction is `unconditional + scale * (conditional - unconditional)`.
        """

        def guided(x, timestep):
            out = denoiser(jnp.concatenate([x, x]), jnp.concatenate([timestep, timestep]))
            halves = jnp.split(out.astype(jnp.float32), 2)
            first = self.order == "conditional first"
            conditional, unconditional = halves if first else halves[::-1]
            count = x.shape[1] if self.channels is None else self.channels
            base, towards = unconditional[:, :count], conditional[:, :count]
            prediction = base + scale * (towards - base)
            return jnp.concatenate([prediction, conditional[:, count:]], axis=1)

        return guided


# facebook's DiT guides three of its four channels ("for exact reproducibility", says its code)
DIT_PUBLISHED = Guidance(channels=3)
DIT_DIFFUSERS = Guidance()
PIXART = Guidance(order="unconditional first")  # its variance is dropped by DPM-Solver
# Open-Sora 1.0 took facebook's guidance over, with the first three of four channels
OPENSORA_1_0 = Guidance(channels=3)
OPENSORA_1_2 = Guidance()
LATTE = Guidance()  # the class-conditional one, as published
LATTE_1 = PIXART  # as diffusers' pipeline has it
