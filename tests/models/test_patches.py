"""Patches, pictures and position tables against torch's convolution, diffusers and the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.models.patches import PatchEmbedder, patches, picture, position_table


# (rows, columns), base, interpolation: DiT's 256 and 512, PixArt's own size, other sizes, both ways
@pytest.mark.parametrize(
    ("grid", "base", "scale"),
    [
        ((16, 16), None, 1.0),
        ((32, 32), None, 1.0),
        ((64, 64), 64, 2.0),
        ((16, 16), 16, 0.5),
        ((128, 128), 128, 4.0),
        ((42, 96), 64, 2.0),
        ((5, 3), 4, 0.5),
        ((1, 7), 4, 1.0),
    ],
)
def test_position_tables_equal_diffusers(grid, base, scale):
    """Sines and cosines of two libraries in float64, rounded to float32: the last bit at most."""
    pytest.importorskip("diffusers", reason="the reference is diffusers")
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    expected = get_2d_sincos_pos_embed(
        48, grid, base_size=base or grid[0], interpolation_scale=scale, output_type="pt"
    )
    table = position_table(grid, 48, base=base, interpolation=scale)
    assert table.dtype == np.float32
    np.testing.assert_allclose(table, expected.float().numpy(), rtol=0, atol=1e-7)


def test_position_zero_then_columns_then_rows():
    table = position_table((2, 3), 8)  # [sin, cos] of the column, then of the row, two frequencies
    np.testing.assert_array_equal(table[0], [0, 0, 1, 1, 0, 0, 1, 1])
    column, row = table[5][:4], table[5][4:]  # row 1, column 2
    np.testing.assert_allclose(column, [*np.sin([2, 0.02]), *np.cos([2, 0.02])], rtol=1e-6)
    np.testing.assert_allclose(row, [*np.sin([1, 0.01]), *np.cos([1, 0.01])], rtol=1e-6)


def test_a_table_is_not_a_constant_of_the_program():
    """PixArt at 2048 x 2048 pixels: 16,384 tokens of 1152 channels; two hex digits to the byte."""
    program = jax.jit(lambda: position_table((128, 128), 1152, base=128)).lower().as_text()
    assert len(program) < 2 * (2 * 128 * 576 * 4) + 10_000  # the two axes, and the operations


def test_patches_and_picture_are_the_published_orders():
    x = jnp.arange(2 * 3 * 4 * 6, dtype=jnp.float32).reshape(2, 3, 4, 6)
    cut = patches(x, 2)  # "c row column" inside a patch, as a convolution's weight has them
    assert cut.shape == (2, 6, 12)
    np.testing.assert_array_equal(cut[1, 3], x[1, :, 2:4, 0:2].reshape(-1))
    outputs = cut.reshape(2, 6, 3, 4).swapaxes(2, 3).reshape(2, 6, 12)  # "row column c"
    np.testing.assert_array_equal(picture(outputs, 2, (2, 3)), x)


def test_the_embedder_is_the_published_convolution():
    """1e-6: sums of 27 products near 1, in float32."""
    torch = pytest.importorskip("torch", reason="the reference is torch")
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 3, 6, 9)), rng.uniform(-0.3, 0.3, (5, 3, 3, 3))
    bias = rng.standard_normal(5)
    expected = torch.nn.functional.conv2d(*map(torch.tensor, (x, weight, bias)), stride=3)
    params = {"proj": {"kernel": weight.reshape(5, -1).T, "bias": bias}}
    embedder = PatchEmbedder(features=5, patch_size=3, dtype=jnp.float32)
    out = embedder.apply({"params": params}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(out, expected.flatten(2).transpose(1, 2).numpy(), atol=1e-6)
