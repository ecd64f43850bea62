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
from jaxtyping import Array, Float, Float32, UInt8

from lowbit_jax.checkpoint import Part, SavedModel, load, read_manifest
from lowbit_jax.models.flux import Modulations
from lowbit_jax.models.flux_modulation import (
    is_modulation,
    modulation_bytes,
    split_modulation,
    step_of,
)
from lowbit_jax.models.patches import patches
from lowbit_jax.models.registry import build, read_config
from lowbit_jax.pipelines import flux_text
from lowbit_jax.pipelines import folder as folders
from lowbit_jax.pipelines.flux_programs import (
    PATCH,
    decoded,
    pooled_vector,
    sampler_step,
    step_modulations,
    text_states,
)
from lowbit_jax.pipelines.picture import Picture, to_bytes
from lowbit_jax.samplers import loop
from lowbit_jax.samplers.flow_euler import FLUX_DEV_GUIDANCE, FlowSchedule, euler_steps

HELD = 10**9  # bytes of modulations that are held on the host, for pictures to come
# the two trees that the transformer's folder holds, see `split_modulation`
TRANSFORMER, MODULATION = "transformer", "modulation"

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
    one entry per prompt (4 MB for FLUX.1-dev in bfloat16). The modulations of all steps are made
    before the first (2.1 MB a step), so the 27 % of the weights that make them are read once.

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
            sequential: keep one part in memory at a time; each is read again for every call. The
                layers that make the transformer's modulations are a part of their own.
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
        self._dtypes = {part: m.get("dtype", "bfloat16") for part, m in manifests.items()}
        self.recipes = {part: m["recipe"]["name"] for part, m in manifests.items()}
        if problems := folders.misfits(self.configs):
            raise folders.PipelineError(f"{self.folder}: {'; '.join(problems)}")
        scheduler = self.folder / "scheduler" / "scheduler_config.json"
        self._schedule = FlowSchedule.from_json(json.loads(scheduler.read_text()))
        self._tokenizers = flux_text.FluxTokenizers.read(self.folder, self.configs)
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
            group = self._group(chosen)
            for first in range(0, len(texts), group):
                some = texts[first : first + group]
                made = [self._modulations(states, chosen, progress) for states in some]
                self._release(MODULATION)
                for index, (states, given) in enumerate(zip(some, made, strict=True), first):
                    if noise is None:
                        start = self.noise(seed + index, chosen.height, chosen.width)
                    else:
                        start = jnp.asarray(noise[index])[None]
                    done = index * chosen.steps, len(texts) * chosen.steps
                    yield self._denoise(states.states, given, start, chosen, done, progress)
                self._release(TRANSFORMER)

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
        if self.is_dev and guidance is None:
            guidance = FLUX_DEV_GUIDANCE
        return Settings(
            steps=steps or (28 if self.is_dev else 4),
            guidance=None if guidance is None else float(guidance),
            height=height,
            width=width,
            max_length=max_length or flux_text.text_length(self.configs["transformer"]),
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
            ids = self._tokenizers(new, max_length, self.report)
            pooled = self._encode_all(flux_text.CLIP, pooled_vector, ids[flux_text.CLIP], progress)
            states = self._encode_all(flux_text.T5, text_states, ids[flux_text.T5], progress)
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

    def _group(self, chosen: Settings) -> int:
        """Pictures whose modulations are made together, so that parts are loaded once for them."""
        if not self.sequential:
            return 1
        width = jnp.dtype(self._dtypes[TRANSFORMER]).itemsize
        each = modulation_bytes(self.configs[TRANSFORMER], chosen.steps, itemsize=width)
        return max(1, HELD // each)

    def _modulations(self, texts: TextStates, chosen: Settings, progress: Progress) -> Modulations:
        """Those of all steps of one picture, on the host."""
        part = self._load(MODULATION, progress)
        scale = None if chosen.guidance is None else jnp.full(1, chosen.guidance, jnp.float32)
        times = self._steps(chosen).timestep
        return jax.device_get(step_modulations(part.model, part.params, times, texts.pooled, scale))

    def _denoise(
        self,
        states: Float[Array, "1 t k"],
        given: Modulations,
        noise: Float[Array, "1 i c"],
        chosen: Settings,
        done: tuple[int, int],
        progress: Progress,
    ) -> Float32[Array, "1 i c"]:
        """The tokens of one picture; `done` are the steps before it, and of all pictures."""
        part, steps = self._load(TRANSFORMER, progress), self._steps(chosen)
        x, _ = loop.start(noise, steps)
        for i in range(chosen.steps):
            now = jax.tree.map(lambda leaf, i=i: leaf[i], steps)
            here = step_of(given, i)
            x = sampler_step(part.model, part.params, x, states, now, here, grid=self._grid(chosen))
            jax.block_until_ready(x)  # else the bar runs ahead, and so does an interrupt
            progress(TRANSFORMER, done[0] + i + 1, done[1])
        return x

    def _steps(self, chosen: Settings) -> loop.Steps:
        rows, columns = self._grid(chosen)
        return euler_steps(self._schedule.sigmas(chosen.steps, rows * columns))

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
            folder = TRANSFORMER if name == MODULATION else name
            wanted = partial(_only, name) if self.sequential else None
            saved: SavedModel = load(self.folder / folder, verify=self.verify, place=wanted)
            model = build(saved.model, saved.config, jnp.dtype(self._dtypes[folder]))
            trees: dict[str, Any] = {name: saved.params}
            if folder == TRANSFORMER and not self.sequential:
                both = split_modulation(saved.params)
                trees = dict(zip((TRANSFORMER, MODULATION), both, strict=True))
            self._parts |= {key: _Part(model, params) for key, params in trees.items()}
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


def _only(name: str, stored: str, part: Part) -> Part:
    """What of a stored part belongs to part `name` of the pipeline."""
    if name not in (TRANSFORMER, MODULATION):
        return part
    once = name == MODULATION
    return {path: leaf for path, leaf in part.items() if is_modulation(path) == once}
