"""What a user of PyTorch would run on the same folder: load, quantise, save. One process per run.

    python -m benchmarks.convert_rivals quanto-int8 SOURCE OUT

`RIVALS` says which there are and which packages each needs beside diffusers; none is needed here.
Each follows the first example of its own documentation, in bfloat16, weights only: its converter
for activations quantises them when the model runs, and stores the same.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Rival:
    """One way of quantising a FLUX in PyTorch.

    Attributes:
        packages: what must be importable.
        quantize: (model, out): in place, then the weights into `out`.
    """

    packages: tuple[str, ...]
    quantize: Callable[[Any, Path], None]

    @property
    def missing(self) -> list[str]:
        """Packages that are not installed."""
        names = ("torch", "diffusers", *self.packages)
        return [name for name in names if importlib.util.find_spec(name.split(".")[0]) is None]


def _quanto(weights: str) -> Callable[[Any, Path], None]:
    def quantize(model: Any, out: Path) -> None:
        from optimum import quanto
        from safetensors.torch import save_file

        quanto.quantize(model, weights=getattr(quanto, weights), include="*transformer_blocks.*")
        quanto.freeze(model)
        save_file(model.state_dict(), out / "model.safetensors")

    return quantize


def _torchao(config: str, **options: Any) -> Callable[[Any, Path], None]:
    def quantize(model: Any, out: Path) -> None:
        import torch
        from torchao import quantization

        def in_blocks(module: Any, name: str) -> bool:
            return isinstance(module, torch.nn.Linear) and "transformer_blocks" in name

        quantization.quantize_(model, getattr(quantization, config)(**options), in_blocks)
        torch.save(model.state_dict(), out / "model.pt")

    return quantize


RIVALS = {
    "quanto-int8": Rival(packages=("optimum.quanto",), quantize=_quanto("qint8")),
    "quanto-int4": Rival(packages=("optimum.quanto",), quantize=_quanto("qint4")),
    "torchao-int8": Rival(packages=("torchao",), quantize=_torchao("Int8WeightOnlyConfig")),
}


def main(argv: list[str]) -> None:
    """Load the transformer of a diffusers folder, quantise its blocks, save."""
    name, source, out = argv
    import torch
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(source, torch_dtype=torch.bfloat16)
    Path(out).mkdir()
    with torch.no_grad():
        RIVALS[name].quantize(model, Path(out))


if __name__ == "__main__":
    main(sys.argv[1:])
