"""A tiny FLUX.1 pipeline as its publishers have it: diffusers' folder, every part random."""

import json
import shutil
from dataclasses import replace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer, T5TokenizerFast

from lowbit_jax.models.flux import FluxConfig
from tests.references.autoencoder_kl import TINY_FLUX, diffusers_vae
from tests.references.flux import diffusers_flux
from tests.references.text_encoders import (
    TINY_CLIP,
    TINY_T5,
    transformers_clip,
    transformers_t5,
)

MERGES = [("t", "h"), ("th", "e</w>"), ("c", "a"), ("ca", "t</w>"), ("a", "n"), ("an", "d</w>")]
WORDS = ["the", "cat", "and", "fox", "snow", "in", "a", "at", "ox", "re", "d"]
EXTRA_IDS = 4

VAE = replace(TINY_FLUX, latent_channels=4, block_out_channels=(8, 16))
FLUX = FluxConfig(
    in_channels=16,
    vec_in_dim=TINY_CLIP.hidden_size,
    context_in_dim=TINY_T5.d_model,
    hidden_size=64,
    num_heads=2,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(8, 12, 12),
)
DEV = dict(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
SCHNELL = dict(shift=1.0, use_dynamic_shifting=False)


def clip_vocabulary():
    """OpenAI's order: bytes, bytes that end a word, merges, the two special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["".join(pair) for pair in MERGES] + ["<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}


def write_clip_tokenizer(folder):
    """The files of the published one: vocab.json, merges.txt and settings."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(clip_vocabulary()))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TINY_CLIP.max_position_embeddings,
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def t5_tokenizer():
    """transformers' tokeniser over a small unigram vocabulary."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(f"\u2581{word}", -3.0 - 0.1 * i) for i, word in enumerate(WORDS)]
    pieces += [(letter, -6.0 - 0.01 * i) for i, letter in enumerate("etaoinshrdlucmfwypvbgkxqjz")]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in range(EXTRA_IDS)[::-1]]
    return T5TokenizerFast(vocab=pieces, extra_ids=EXTRA_IDS, model_max_length=24)


def write_pipeline(folder, *, dev=True):
    """Write a pipeline as diffusers saves it; the transformer in one file, T5 in shards."""
    vocabulary = clip_vocabulary()
    clip = replace(
        TINY_CLIP, vocab_size=len(vocabulary), eos_token_id=2 if dev else len(vocabulary) - 1
    )
    write_clip_tokenizer(folder / "files")
    vae = diffusers_vae(VAE)
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 0.2  # else most of a picture is clipped
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**(DEV if dev else SCHNELL)),
        vae=vae,
        text_encoder=transformers_clip(clip),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "files"),
        text_encoder_2=transformers_t5(TINY_T5),
        tokenizer_2=t5_tokenizer(),
        transformer=diffusers_flux(replace(FLUX, guidance_embed=dev)),
    )
    pipeline.save_pretrained(folder, max_shard_size="30KB")
    shutil.rmtree(folder / "tokenizer")
    (folder / "files").rename(folder / "tokenizer")  # as published, not as transformers 5 saves
    return folder


def encode_prompts(folder, prompts, length):
    """diffusers' states of T5 and vectors of CLIP, float32."""
    pipeline = FluxPipeline.from_pretrained(folder)
    with torch.no_grad():
        states, pooled, _ = pipeline.encode_prompt(
            list(prompts), prompt_2=None, max_sequence_length=length
        )
    return states.numpy(), pooled.numpy()


def run_pipeline(folder, prompts, noise, *, steps, guidance, height, width, max_length):
    """diffusers' pictures as bytes."""
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    out = pipeline(
        list(prompts),
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=height,
        width=width,
        latents=torch.tensor(noise),
        max_sequence_length=max_length,
        output_type="np",
    )
    return out.images
