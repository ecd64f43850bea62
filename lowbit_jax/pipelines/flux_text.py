"""What FLUX.1's two text encoders are given: token ids of CLIP and of T5."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from lowbit_jax.models.clip_text import LEGACY_EOS
from lowbit_jax.pipelines.text import TextTokenizer, clip_tokenizer, t5_tokenizer

# parts of a pipeline's folder
CLIP, T5 = "text_encoder", "text_encoder_2"


def text_length(transformer: Any) -> int:
    """Tokens of T5 that a FLUX of this config is published with: 512 for dev, 256 for schnell."""
    return 512 if transformer.guidance_embed else 256


@dataclass(frozen=True, eq=False)
class FluxTokenizers:
    """Both tokenisers of a pipeline.

    Attributes:
        clip: of CLIP.
        t5: of T5.
        positions: tokens that CLIP takes.
    """

    clip: TextTokenizer
    t5: TextTokenizer
    positions: int

    @classmethod
    def read(cls, folder: Path, configs: Mapping[str, Any]) -> FluxTokenizers:
        """Those in `tokenizer/` and `tokenizer_2/` of a pipeline's folder.

        Args:
            folder: of the pipeline, converted or diffusers'.
            configs: of the text encoders, by part.

        Raises:
            PipelineError: not the files of these tokenisers, or not those of these encoders.
            ModuleNotFoundError: the package tokenizers is not installed.
        """
        clip, t5 = configs[CLIP], configs[T5]
        end = None if clip.eos_token_id == LEGACY_EOS else clip.eos_token_id
        return cls(
            clip=clip_tokenizer(folder / "tokenizer", clip.vocab_size, end),
            t5=t5_tokenizer(folder / "tokenizer_2", t5.vocab_size),
            positions=clip.max_position_embeddings,
        )

    def __call__(
        self, prompts: Sequence[str], length: int, report: Callable[[str], object]
    ) -> dict[str, Int32[np.ndarray, "b t"]]:
        """Token ids by part.

        Args:
            prompts: any number.
            length: tokens of T5.
            report: told of what was cut off a prompt that is too long.
        """
        tokens = {CLIP: self.clip(prompts, self.positions), T5: self.t5(prompts, length)}
        for name, found in zip(("CLIP", "T5"), tokens.values(), strict=True):
            for prompt, rest in zip(prompts, found.dropped, strict=True):
                if rest:
                    report(
                        f"{name} takes {found.ids.shape[1]} tokens; of {prompt[:40]!r}... it does "
                        f"not see {rest!r}"
                    )
        return {part: found.ids for part, found in tokens.items()}
