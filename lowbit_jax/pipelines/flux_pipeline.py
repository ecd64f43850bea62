"""FLUX.1 from a prompt to pixels: text encoders, transformer, sampler, decoder.

Shape letters: b batch, t text tokens, i image tokens, c channels of one, y rows and x columns of
latents, z latent channels.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Float32, Int, UInt8

from lowbit_jax.checkpoint import SavedModel, load, read_manifest
from lowbit_jax.models.autoencoder_kl import restore
from lowbit_jax.models.clip_text import LEGACY_EOS
from lowbit_jax.models.flux import image_ids, text_ids
from lowbit_jax.models.patches import patches
from lowbit_jax.models.registry import build, read_config
from lowbit_jax.pipelines import folder as folders
from lowbit_jax.pipelines import text
from lowbit_jax.pipelines.picture import Picture, to_bytes
from lowbit_jax.samplers import loop
from lowbit_jax.samplers.flow_euler import FlowSchedule, euler_steps

PATCH = 2  # rows and columns of latents of one token
GUIDANCE = 3.5  # the usual one of FLUX.1-dev

Progress = Callable[[str, int, int], object]


class TextStates(NamedTuple):
    """What the text encoders give of one prompt.

    Attributes:
        pooled: of CLIP.
        states: of T5, padding too.
    """

    pooled: Float[Array, "1 k"]
    states: Float[Array, "1 t k"]


class _Part(NamedTuple):
    """A loaded part."""

    model: nn.Module
    params: Any


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked of the sampler, checked: see `FluxPipeline.settings`."""

    steps: int
    guidance: float | None
    height: int
    width: int
    max_length: int


class FluxPipeline:
    """`FluxPipeline("flux-ternary")("a fox in the snow")[0].save("fox.png")`.

    Parts may be float or quantised in any mix: what their kernels are decides. Pictures are made
    one after the other, so that each depends on its prompt and seed alone. Text states are kept,
    one entry per prompt (4 MB for FLUX.1-dev in bfloat16).

    Attributes:
        folder: the converted pipeline, see `lowbit_jax.pipelines.folder`.
        configs: of the parts, by name.
        recipes: names of the parts' recipes.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        sequential: bool = False,
        verify: bool = True,
        report: Callable[[str], object] = warnings.warn,
    ):
        """Check the folder and read what is small; parts are loaded when they are first needed.

        Args:
            folder: made by `convert_and_quantize` from a whole diffusers folder.
            sequential: keep one part in memory at a time; each is read again for every call.
            verify: compare the digests of all tensors when a part is loaded.
            report: told of what was cut off a prompt that is too long.

        Raises:
            PipelineError: a part is missing or another's, sizes or tokenisers do not fit.
            SavedModelError: a part that is damaged.
            ValueError: a scheduler that is not ported.
        """
        self.folder = Path(folder)
        self.sequential = sequential
        self.verify = verify
        self.report = report
        folders.check_folder(self.folder, folders.FLUX)
        manifests = {part: read_manifest(self.folder / part) for part in folders.FLUX.models}
        for part, model in folders.FLUX.models.items():
            if manifests[part]["model"] != model:
                raise folders.PipelineError(
                    f"{self.folder / part}: holds {manifests[part]['model']}, not {model}"
                )
        self.configs = {part: read_config(m["model"], m["config"]) for part, m in manifests.items()}
        self.recipes = {part: m["recipe"]["name"] for part, m in manifests.items()}
        if problems := folders.misfits(self.configs):
            raise folders.PipelineError(f"{self.folder}: {'; '.join(problems)}")
        scheduler = self.folder / "scheduler" / "scheduler_config.json"
        self._schedule = FlowSchedule.from_json(json.loads(scheduler.read_text()))
        clip, t5 = self.configs["text_encoder"], self.configs["text_encoder_2"]
        end = None if clip.eos_token_id == LEGACY_EOS else clip.eos_token_id
        self._clip_tokens = text.clip_tokenizer(self.folder / "tokenizer", clip.vocab_size, end)
        self._t5_tokens = text.t5_tokenizer(self.folder / "tokenizer_2", t5.vocab_size)
        self._parts: dict[str, _Part] = {}
        self._texts: dict[tuple[str, int], TextStates] = {}

    @property
    def is_dev(self) -> bool:
        """Whether the transformer takes a guidance scale, as FLUX.1-dev and not schnell."""
        return self.configs["transformer"].guidance_embed

    def __call__(self, prompts: str | Sequence[str], **options: Any) -> list[Picture]:
        """A picture of each prompt: all that `stream` gives."""
        return list(self.stream(prompts, **options))

    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        noise: Float[Array, "b i c"] | None = None,
        progress: Progress = lambda stage, done, total: None,
        **options: Any,
    ) -> Iterator[Picture]:
        """A picture of each prompt, each as soon as it is there.

        With `sequential` that is when the latents of all of them are.

        Args:
            prompts: one or several.
            seed: of the first picture's noise; the next has the next one.
            noise: that noise itself, tokens of 2x2 latents with channels outermost, as diffusers'
                pipeline takes it for `latents`.
            progress: called as (stage, pictures or steps done, of how many).
            options: see `settings`.

        Raises:
            ValueError: options that this pipeline cannot do, or noise of another shape.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        chosen = self.settings(**options)
        if noise is not None:
            self._check_noise(noise, len(prompts), chosen)
        texts = self.encode(prompts, chosen.max_length, progress)

        def latents() -> Iterator[Array]:
            for index, states in enumerate(texts):
                if noise is None:
                    start = self.noise(seed + index, chosen.height, chosen.width)
                else:
                    start = jnp.asarray(noise[index])[None]
                done = index * chosen.steps, len(texts) * chosen.steps
                yield self._denoise(states, start, chosen, done, progress)
            self._release("transformer")

        found = list(latents()) if self.sequential else latents()
        for index, (prompt, tokens) in enumerate(zip(prompts, found, strict=True)):
            pixels = self._decode(tokens, chosen, progress)
            progress("vae", index + 1, len(prompts))
            settings = self._describe(prompt, chosen, None if noise is not None else seed + index)
            yield Picture(pixels=pixels, settings=settings)
        self._release("vae")

    def settings(
        self,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        height: int = 1024,
        width: int = 1024,
        max_length: int | None = None,
    ) -> Settings:
        """The options of a call, with what is usual for the model in place of None.

        Args:
            steps: of the sampler; 28 for dev, 4 for schnell.
            guidance: distilled guidance scale, of dev only; 3.5.
            height: of the picture, in pixels.
            width: of the picture, in pixels.
            max_length: tokens of T5; 512 for dev, 256 for schnell.

        Raises:
            ValueError: a guidance for schnell, sizes that are not whole tokens, no steps.
        """
        if guidance is not None and not self.is_dev:
            raise ValueError(f"guidance is {guidance}; this model (schnell) takes none")
        side = PATCH * self.configs["vae"].pixels
        if height < side or width < side or height % side or width % side:
            near = " x ".join(f"{max(side, round(n / side) * side)}" for n in (height, width))
            raise ValueError(
                f"height x width is {height} x {width}; both must be multiples of {side}, "
                f"such as {near}"
            )
        for name, value in (("steps", steps), ("max_length", max_length)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, it must be at least 1")
        return Settings(
            steps=steps or (28 if self.is_dev else 4),
            guidance=(GUIDANCE if guidance is None else float(guidance)) if self.is_dev else None,
            height=height,
            width=width,
            max_length=max_length or (512 if self.is_dev else 256),
        )

    def noise(self, seed: int, height: int, width: int) -> Float32[Array, "1 i c"]:
        """The standard normal start of a picture, the same for every recipe."""
        vae = self.configs["vae"]
        shape = (1, vae.latent_channels, height // vae.pixels, width // vae.pixels)
        return patches(jax.random.normal(jax.random.key(seed), shape), PATCH)

    def encode(
        self,
        prompts: Sequence[str],
        max_length: int,
        progress: Progress = lambda stage, done, total: None,
    ) -> list[TextStates]:
        """Text states of prompts, from memory where they have been encoded before.

        Args:
            prompts: any number.
            max_length: tokens of T5.
            progress: see `stream`.
        """
        new = [p for p in dict.fromkeys(prompts) if (p, max_length) not in self._texts]
        if new:
            positions = self.configs["text_encoder"].max_position_embeddings
            tokens = [self._clip_tokens(new, positions), self._t5_tokens(new, max_length)]
            for name, found in zip(("CLIP", "T5"), tokens, strict=True):
                for prompt, rest in zip(new, found.dropped, strict=True):
                    if rest:
                        length = found.ids.shape[1]
                        self.report(
                            f"{name} takes {length} tokens; of {prompt[:40]!r}... it does not see "
                            f"{rest!r}"
                        )
            pooled = self._encode_all("text_encoder", pooled_vector, tokens[0].ids, progress)
            states = self._encode_all("text_encoder_2", text_states, tokens[1].ids, progress)
            for prompt, *both in zip(new, pooled, states, strict=True):
                self._texts[prompt, max_length] = TextStates(*both)
        return [self._texts[prompt, max_length] for prompt in prompts]

    def _encode_all(self, name: str, encode: Callable, ids: np.ndarray, progress: Progress) -> list:
        part = self._load(name, progress)
        found = []
        for index, row in enumerate(ids):
            found.append(encode(part.model, part.params, row[None]))
            progress(name, index + 1, len(ids))
        jax.block_until_ready(found)
        self._release(name)
        return found

    def _denoise(
        self,
        texts: TextStates,
        noise: Float[Array, "1 i c"],
        chosen: Settings,
        done: tuple[int, int],
        progress: Progress,
    ) -> Float32[Array, "1 i c"]:
        """The tokens of one picture; `done` are the steps before it, and of all pictures."""
        part, grid = self._load("transformer", progress), self._grid(chosen)
        steps = euler_steps(self._schedule.sigmas(chosen.steps, grid[0] * grid[1]))
        scale = None if chosen.guidance is None else jnp.full(1, chosen.guidance, jnp.float32)
        x, _ = loop.start(noise, steps)
        for index in range(chosen.steps):
            now = jax.tree.map(lambda leaf, i=index: leaf[i], steps)
            x = sampler_step(part.model, part.params, x, texts, now, scale, grid=grid)
            jax.block_until_ready(x)  # else the bar runs ahead, and so does an interrupt
            progress("transformer", done[0] + index + 1, done[1])
        return x

    def _decode(
        self, tokens: Float[Array, "1 i c"], chosen: Settings, progress: Progress
    ) -> UInt8[np.ndarray, "Y X 3"]:
        part = self._load("vae", progress)
        pixels = decoded(part.model, part.params, tokens, grid=self._grid(chosen))
        return to_bytes(jax.device_get(pixels)[0])

    def _grid(self, chosen: Settings) -> tuple[int, int]:
        """Rows and columns of tokens."""
        side = PATCH * self.configs["vae"].pixels
        return chosen.height // side, chosen.width // side

    def _load(self, name: str, progress: Progress) -> _Part:
        if name not in self._parts:
            if self.sequential:
                self._parts.clear()
            progress(f"loading {name}", 0, 1)
            saved: SavedModel = load(self.folder / name, verify=self.verify)
            dtype = saved.manifest.get("dtype", "bfloat16")
            self._parts[name] = _Part(
                build(saved.model, saved.config, jnp.dtype(dtype)), saved.params
            )
            progress(f"loading {name}", 1, 1)
        return self._parts[name]

    def _release(self, name: str) -> None:
        if self.sequential:
            self._parts.pop(name, None)

    def _check_noise(self, noise: Any, prompts: int, chosen: Settings) -> None:
        rows, columns = self._grid(chosen)
        wanted = (prompts, rows * columns, self.configs["transformer"].in_channels)
        if np.shape(noise) != wanted:
            raise ValueError(f"noise has shape {np.shape(noise)}, these pictures need {wanted}")

    def _describe(self, prompt: str, chosen: Settings, seed: int | None) -> dict[str, str]:
        values = {
            "prompt": prompt,
            "seed": "given noise" if seed is None else seed,
            "steps": chosen.steps,
            "guidance": "none" if chosen.guidance is None else f"{chosen.guidance:g}",
            "size": f"{chosen.width} x {chosen.height}",
            "model": "FLUX.1 dev" if self.is_dev else "FLUX.1 schnell",
            **{f"recipe of {part}": name for part, name in self.recipes.items()},
            "software": f"lowbit-jax {metadata.version('lowbit-jax')}, jax {jax.__version__}",
        }
        return {name: str(value) for name, value in values.items()}


@partial(jax.jit, static_argnames="model")
def pooled_vector(model, params, ids: Int[Array, "b t"]) -> Float[Array, "b k"]:
    """CLIP's vector of each text."""
    return model.apply({"params": params}, ids)[1]


@partial(jax.jit, static_argnames="model")
def text_states(model, params, ids: Int[Array, "b t"]) -> Float[Array, "b t k"]:
    """T5's states of each text, padding attended to."""
    return model.apply({"params": params}, ids)


@partial(jax.jit, static_argnames=("model", "grid"))
def sampler_step(model, params, x, texts: TextStates, now: loop.Steps, guidance, *, grid):
    """One step of the sampler, compiled once for all of them."""
    ids = image_ids(*grid), text_ids(texts.states.shape[1])

    def velocity(x, t):
        out = (x, texts.states, t, texts.pooled)
        return model.apply({"params": params}, *out, *ids, guidance=guidance)

    return loop.advance(velocity, (x, None), now)[0]


@partial(jax.jit, static_argnames=("model", "grid"))
def decoded(model, params, tokens, *, grid):
    """The pixels, about in [-1, 1], of tokens on a grid, float32."""
    latents = restore(model.config, unpack(tokens, grid))
    return model.apply({"params": params}, latents, method="decode").astype(jnp.float32)


def unpack(tokens: Float[Array, "b i c"], grid: tuple[int, int]) -> Float[Array, "b y x z"]:
    """Latents of tokens, "z row column" inside each: inverse of `patches`, channels last."""
    b, rows, columns = len(tokens), *grid
    cut = tokens.reshape(b, rows, columns, -1, PATCH, PATCH).transpose(0, 1, 4, 2, 5, 3)
    return cut.reshape(b, rows * PATCH, columns * PATCH, -1)
