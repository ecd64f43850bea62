"""The parts of a recipe's rules: how weights are quantised, how channels are balanced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowbit_jax.quant.masks import checked_alpha
from pallas_kernels.formats import FORMATS

INTEGER_QUANTIZERS = ("absmax", "minmax", "mse")
TERNARY_QUANTIZERS = ("absmean", "twn", "least_squares")


class RecipeError(ValueError):
    """A recipe that is malformed, or that does not fit the model it is used on."""


@dataclass(frozen=True, kw_only=True)
class WeightSpec:
    """How a weight matrix is quantised.

    Attributes:
        format: key of `pallas_kernels.formats.FORMATS`.
        quantizer: function of `lowbit_jax.quant.quantizers`: absmax (symmetric), minmax
            (asymmetric) or mse for integers; absmean, twn or least_squares for ternary.
        granularity: what shares a scale: "channel" (one output), "tensor", or a number of inputs.
        feedback: choose codes on the quantizer's grid by error feedback (GPTQ, `quant.feedback`):
            what rounding one input's weights loses, later inputs make up. Needs statistics with
            X^T X of the inputs.
    """

    format: str
    quantizer: str
    granularity: str | int = "channel"
    feedback: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise RecipeError(f"format '{self.format}' is none of {', '.join(FORMATS)}")
        known = TERNARY_QUANTIZERS if self.format == "ternary" else INTEGER_QUANTIZERS
        if self.quantizer not in known:
            raise RecipeError(
                f"quantizer '{self.quantizer}' of {self.format} is none of {', '.join(known)}"
            )
        if not isinstance(self.feedback, bool):
            raise RecipeError(f"feedback {self.feedback!r} is no boolean")
        if not (self.granularity in ("channel", "tensor") or is_positive(self.granularity)):
            raise RecipeError(
                f"granularity {self.granularity!r} is neither 'channel', 'tensor' nor a group size"
            )


@dataclass(frozen=True, kw_only=True)
class Balance:
    """How the channels of a linear's input are balanced with its weights; needs statistics.

    Attributes:
        alpha: SmoothQuant's, in [0, 1]: see `lowbit_jax.quant.masks`. Several: one for each
            timestep range of the statistics, from time 0 upwards, each with a mask and weights of
            its own, see `lowbit_jax.quant.ranged`. "auto": for each layer the one of a few, or no
            balance, with the least error of its output, see `lowbit_jax.quant.weights`.
    """

    alpha: float | tuple[float, ...] | str

    def __post_init__(self) -> None:
        if isinstance(self.alpha, list):  # JSON has no tuples
            object.__setattr__(self, "alpha", tuple(self.alpha))
        if self.alpha == ():
            raise RecipeError("balance: no alpha")
        if self.alpha == "auto":
            return
        try:
            for alpha in self.alphas:
                checked_alpha(alpha)
        except ValueError as error:
            raise RecipeError(f"balance: {error}") from None

    @property
    def alphas(self) -> tuple[Any, ...]:
        """All of them."""
        return self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)

    @property
    def ranges(self) -> int | None:
        """How many timestep ranges have a mask of their own; None for one mask for all."""
        return len(self.alpha) if isinstance(self.alpha, tuple) else None


def is_positive(value: Any) -> bool:
    """Whether a value is a positive integer, and no boolean."""
    return type(value) is int and value > 0
