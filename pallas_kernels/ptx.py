"""Assembly where Triton's own operation rounds, converts or unpacks in another way."""

from __future__ import annotations

import jax
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Shaped


def ptx(
    assembly: str, constraints: str, *args: Shaped[Array, "r c"], dtype, pack: int = 1
) -> Shaped[Array, "r c"]:
    """One PTX text for each `pack` elements of arrays of one shape; for CUDA only.

    Args:
        assembly: $0 and on are the outputs, then come the inputs.
        constraints: "=r" or "=f" for each output register, then "r" or "f" for each input.
        args: the inputs.
        dtype: of the result.
        pack: elements that one run of the text takes; smaller than 4 bytes, they share registers.
    """
    (result,) = pltriton.elementwise_inline_asm(
        assembly,
        args=args,
        constraints=constraints,
        pack=pack,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, dtype)],
    )
    return result
