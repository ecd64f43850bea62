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
class Feedback:
    """Settings of error feedback, see `lowbit_jax.quant.feedback`.

    Attributes:
        damping: added to the diagonal of X^T X, as a share of its mean.
        act_order: round inputs with a large diagonal first.
        refits: of ternary scales, each followed by another rounding.
    """

    damping: float = 0.01
    act_order: bool = True
    refits: int = 8

    def __post_init__(self) -> None:
        number = isinstance(self.damping, int | float) and not isinstance(self.damping, bool)
        if not (number and self.damping >= 0 and is_positive(self.refits)):
            raise RecipeError(f"damping from 0 and refits from 1 are possible, got {self}")
        if not isinstance(self.act_order, bool):
            raise RecipeError(f"act_order {self.act_order!r} is no boolean")


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
            X^T X of the inputs. True for the usual settings.
    """

    format: str
    quantizer: str
    granularity: str | int = "channel"
    feedback: Feedback | bool | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise RecipeError(f"format '{self.format}' is none of {', '.join(FORMATS)}")
        known = TERNARY_QUANTIZERS if self.format == "ternary" else INTEGER_QUANTIZERS
        if self.quantizer not in known:
            raise RecipeError(
                f"quantizer '{self.quantizer}' of {self.format} is none of {', '.join(known)}"
            )
        if isinstance(self.feedback, bool):
            object.__setattr__(self, "feedback", Feedback() if self.feedback else None)
        if not isinstance(self.feedback, Feedback | None):
            raise RecipeError(f"feedback {self.feedback!r} is neither settings nor a boolean")
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
