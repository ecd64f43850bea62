"""The convolutional autoencoder of latent diffusion: pictures to latents and back.

Source: Rombach et al. 2022, section 3.1 and appendix G; FLUX.1's has 16 channels and no 1x1
convolutions around the latents, Stable Diffusion's (DiT, PixArt, Latte, STDiT) 4 channels and both.
Channels come last, inside and at the interfaces.
Shape letters: b batch, y rows and x columns of latents, Y and X of pixels, c channels, z latent
channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from lowbit_jax.models.attention import attention
from lowbit_jax.models.convolution import Conv, upsample_nearest
from lowbit_jax.models.layers import Linear

EPS = 1e-6  # of every norm
LOGVAR_RANGE = -30.0, 20.0


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Sizes of an autoencoder, named as in diffusers' `config.json`; default FLUX.1's.

    Attributes:
        latent_channels: z.
        block_out_channels: channels of each level; every level but the last halves the size.
        layers_per_block: residual blocks of a level of the encoder; the decoder has one more.
        norm_num_groups: groups of every norm; must divide the channels of every level.
        scaling_factor: the network of a diffusion works on (latents - shift_factor) * it.
        shift_factor: see `scaling_factor`.
        use_quant_conv: a 1x1 convolution after the encoder.
        use_post_quant_conv: a 1x1 convolution before the decoder.

    Raises:
        ValueError: channels that are not whole groups, or no level.
    """

    in_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False

    def __post_init__(self) -> None:
        odd = [n for n in self.block_out_channels if n % self.norm_num_groups]
        if odd or not self.block_out_channels:
            raise ValueError(
                f"block_out_channels {self.block_out_channels} must be multiples of "
                f"norm_num_groups {self.norm_num_groups}, and at least one"
            )

    @property
    def pixels(self) -> int:
        """Rows and columns of pixels of one latent."""
        return 2 ** (len(self.block_out_channels) - 1)


FLUX_VAE = AutoencoderConfig()
SD_VAE = AutoencoderConfig(
    latent_channels=4,
    scaling_factor=0.18215,
    shift_factor=0.0,
    use_quant_conv=True,
    use_post_quant_conv=True,
)


def standardise(
    config: AutoencoderConfig, latents: Float[Array, "b y x z"]
) -> Float[Array, "b y x z"]:
    """Latents as a diffusion's network takes them, of about unit variance."""
    return (latents - config.shift_factor) * config.scaling_factor


def restore(config: AutoencoderConfig, latents: Float[Array, "b y x z"]) -> Float[Array, "b y x z"]:
    """Inverse of `standardise`: what `AutoencoderKL.decode` takes."""
    return latents / config.scaling_factor + config.shift_factor


class GroupNormSilu(nn.Module):
    """SiLU of a group norm; statistics in float32, in two passes: E[x^2] - E[x]^2 cancels."""

    config: AutoencoderConfig
    dtype: Any
    silu: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b y x c"]) -> Float[Array, "b y x c"]:
        """Normalise."""
        norm = nn.GroupNorm(
            self.config.norm_num_groups,
            epsilon=EPS,
            dtype=self.dtype,
            use_fast_variance=False,
            name="norm",
        )
        nn.share_scope(self, norm)
        return nn.silu(norm(x)) if self.silu else norm(x)


class ResidualBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice; a 1x1 convolution beside where channels change."""

    features: int
    config: AutoencoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b y x c"]) -> Float[Array, "b y x n"]:
        """Apply."""
        norm = partial(GroupNormSilu, self.config, self.dtype)
        conv = partial(Conv, self.features, dtype=self.dtype)
        h = conv(name="conv1")(norm(name="norm1")(x))
        h = conv(name="conv2")(norm(name="norm2")(h))
        if x.shape[-1] != self.features:
            x = conv(window=1, name="shortcut")(x)
        return x + h


class PixelAttention(nn.Module):
    """Attention of every pixel to all, in one head as wide as the channels."""

    config: AutoencoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b y x c"]) -> Float[Array, "b y x c"]:
        """Add what is attended to."""
        h = GroupNormSilu(self.config, self.dtype, silu=False, name="norm")(x)
        h = h.reshape(h.shape[0], -1, h.shape[-1])
        linear = partial(Linear, h.shape[-1], dtype=self.dtype)
        q, k, v = (linear(name=name)(h)[:, :, None] for name in "qkv")
        return x + linear(name="proj_out")(attention(q, k, v)[:, :, 0]).reshape(x.shape)


class Middle(nn.Module):
    """Residual block, attention, residual block."""

    config: AutoencoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b y x c"]) -> Float[Array, "b y x c"]:
        """Apply."""
        block = partial(ResidualBlock, x.shape[-1], self.config, self.dtype)
        x = PixelAttention(self.config, self.dtype, name="attn")(block(name="block_0")(x))
        return block(name="block_1")(x)


class Level(nn.Module):
    """The residual blocks of one resolution, and the convolution to the next.

    Attributes:
        features: channels after the first block.
        blocks: residual blocks.
        resample: "down" or "up" to the next resolution, or None.
    """

    features: int
    blocks: int
    resample: str | None
    config: AutoencoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b y x c"]) -> Float[Array, "b y2 x2 n"]:
        """Apply."""
        for index in range(self.blocks):
            name = f"block_{index}"
            x = ResidualBlock(self.features, self.config, self.dtype, name=name)(x)
        conv = partial(Conv, self.features, dtype=self.dtype)
        if self.resample == "down":  # zeros after the last row and column only
            return conv(stride=2, padding=(0, 1), name="downsample")(x)
        return conv(name="upsample")(upsample_nearest(x)) if self.resample == "up" else x


class Encoder(nn.Module):
    """Pixels to the means and log variances of latents."""

    config: AutoencoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b Y X c"]) -> Float[Array, "b y x z2"]:
        """Encode."""
        config, channels = self.config, self.config.block_out_channels
        x = Conv(channels[0], dtype=self.dtype, name="conv_in")(x)
        for index, features in enumerate(channels):
            resample = None if index == len(channels) - 1 else "down"
            level = partial(Level, features, config.layers_per_block, resample)
            x = level(config, self.dtype, name=f"down_{index}")(x)
        x = Middle(config, self.dtype, name="mid")(x)
        x = GroupNormSilu(config, self.dtype, name="norm_out")(x)
        return Conv(2 * config.latent_channels, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents to pixels."""

    config: AutoencoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, z: Float[Array, "b y x z"]) -> Float[Array, "b Y X c"]:
        """Decode."""
        config, channels = self.config, self.config.block_out_channels[::-1]
        x = Conv(channels[0], dtype=self.dtype, name="conv_in")(z)
        x = Middle(config, self.dtype, name="mid")(x)
        for index, features in enumerate(channels):
            resample = None if index == len(channels) - 1 else "up"
            level = partial(Level, features, config.layers_per_block + 1, resample)
            x = level(config, self.dtype, name=f"up_{index}")(x)
        x = GroupNormSilu(config, self.dtype, name="norm_out")(x)
        return Conv(config.in_channels, dtype=self.dtype, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """`model.apply({"params": params}, latents, method="decode")`, and "encode" for the way there.

    Attributes:
        config: sizes.
        dtype: dtype of activations and products; parameters keep their own.
    """

    config: AutoencoderConfig = FLUX_VAE
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Names the halves; a method runs with the parameters of its half alone."""
        config, conv = self.config, partial(Conv, window=1, dtype=self.dtype)
        self.encoder = Encoder(config, self.dtype)
        self.decoder = Decoder(config, self.dtype)
        if config.use_quant_conv:
            self.quant_conv = conv(2 * config.latent_channels)
        if config.use_post_quant_conv:
            self.post_quant_conv = conv(config.latent_channels)

    def encode(
        self, pixels: Float[Array, "b Y X c"]
    ) -> tuple[Float[Array, "b y x z"], Float[Array, "b y x z"]]:
        """Means and log variances (clipped to -30, 20) of the latents of pictures in [-1, 1].

        Raises:
            ValueError: rows or columns that are not whole latents.
        """
        pixels_per_latent = self.config.pixels
        if pixels.shape[1] % pixels_per_latent or pixels.shape[2] % pixels_per_latent:
            raise ValueError(
                f"a picture of {pixels.shape[1]} x {pixels.shape[2]} pixels is not whole latents "
                f"of {pixels_per_latent}; crop or pad it"
            )
        moments = self.encoder(pixels)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, latents: Float[Array, "b y x z"]) -> Float[Array, "b Y X c"]:
        """Pictures, about in [-1, 1], of latents as `encode` gives them; see also `restore`."""
        if self.config.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)

    def __call__(self, pixels: Float[Array, "b Y X c"]) -> Float[Array, "b Y X c"]:
        """There and back, by the means."""
        return self.decode(self.encode(pixels)[0])


def abstract_params(config: AutoencoderConfig, dtype: Any = jnp.bfloat16) -> Any:
    """The parameter tree without memory: `jax.ShapeDtypeStruct` leaves of `dtype`."""
    side = config.pixels
    pixels = jax.ShapeDtypeStruct((1, side, side, config.in_channels), jnp.float32)
    params = jax.eval_shape(AutoencoderKL(config).init, jax.random.key(0), pixels)["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)
