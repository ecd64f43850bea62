"""Which backend runs, and what each of them refuses."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import api, packing
from tests.references import rows as exactly

M, N, K = 3, 5, 200


def calls():
    """{op: its arguments}; |sums| stay below 2^24, where every backend is exact."""
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(-127, 128, (M, K)), jnp.int8)
    w = jnp.asarray(rng.integers(-127, 128, (N, K)), jnp.int8)
    trits = packing.pack(jnp.asarray(rng.integers(0, 3, (N, K)), jnp.uint8), 2)
    scales = jnp.asarray(rng.uniform(size=(M, 1)), jnp.float32), jnp.ones(N, jnp.float32) / 3
    x, shift, scale = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((2, M, K), (2, K), (2, K))
    )
    return {
        api.quantize_rows: (x,),
        api.gelu_quantize_rows: (x,),
        api.modulate_quantize_rows: (x, shift, scale),
        api.int8_matmul: (codes, w, *scales),
        api.ternary_matmul: (codes, trits, *scales),
    }


OPS = pytest.mark.parametrize("op", list(calls()), ids=lambda op: op.__name__)


@OPS
def test_backends_agree(op):
    args = calls()[op]
    by_default, xla, kernel = (
        jax.tree.leaves(jax.jit(lambda *a, i=i: op(*a, implementation=i))(*args))
        for i in (None, "xla", "interpret")
    )
    for a, b, c in zip(by_default, xla, kernel, strict=True):
        assert a.dtype == b.dtype == c.dtype and a.shape == b.shape == c.shape
        np.testing.assert_array_equal(a, b)
        if op not in (api.gelu_quantize_rows, api.modulate_quantize_rows):  # float32 in between
            np.testing.assert_array_equal(b, c)


@pytest.mark.parametrize("op", (api.int8_matmul, api.ternary_matmul), ids=lambda op: op.__name__)
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_backends_agree_on_bias_and_dtype(op, dtype):
    args, bias = calls()[op], jnp.linspace(-1, 1, N, dtype=jnp.float32)
    xla, kernel = (op(*args, bias, out_dtype=dtype, implementation=i) for i in ("xla", "interpret"))
    assert xla.dtype == kernel.dtype == dtype
    # a compiler may fuse the last product with the sum, which skips a rounding
    np.testing.assert_allclose(xla.astype(float), kernel.astype(float), rtol=jnp.finfo(dtype).eps)


@OPS
def test_no_kernel_runs_by_default(op, monkeypatch):
    """None of them has run on a GPU yet: also there the default is plain XLA."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    args = calls()[op]
    assert "pallas" not in str(jax.make_jaxpr(op)(*args))
    kernel = jax.make_jaxpr(lambda *a: op(*a, implementation="interpret"))(*args)
    assert "pallas_call" in str(kernel)


@OPS
def test_triton_needs_a_cuda_device(op, monkeypatch):
    args = calls()[op]
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with pytest.raises(NotImplementedError, match="the platform is cpu"):
        op(*args, implementation="triton")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for capability in ("7.5", "gfx942"):
        device = SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        with pytest.raises(NotImplementedError, match=f"the device has {capability}"):
            op(*args, implementation="triton")
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability="8.0")])
    traced = jax.make_jaxpr(lambda *a: op(*a, implementation="triton"))(*args)
    assert "pallas_call" in str(traced)


@OPS
def test_an_unknown_implementation(op):
    with pytest.raises(ValueError, match="'cuda'"):
        op(*calls()[op], implementation="cuda")


@pytest.mark.parametrize("implementation", ("xla", "interpret"))
def test_rows_take_bits_mask_and_rotation(implementation):
    """The second image's last row: no axis is lost, no argument left behind."""
    x, shift, scale = calls()[api.modulate_quantize_rows]
    x, shift, scale = x[..., :192], shift[:, :192], scale[:, :192]
    mask = jnp.linspace(-1, 2, 192, dtype=jnp.float32)
    options = dict(mask=mask, rotation=64, implementation=implementation)
    x64, shift64, scale64 = (np.asarray(a).astype(float) for a in (x, shift, scale))
    for found, exact in (
        (api.quantize_rows(x, 4, **options), x64),
        (api.gelu_quantize_rows(x, 4, **options), exactly.gelu(x64)),
        (
            api.modulate_quantize_rows(x, shift, scale, 4, eps=0.5, **options),
            exactly.modulate(x64, shift64, scale64, eps=0.5),
        ),
    ):
        exact = exactly.rotate(exact * np.asarray(mask, float), 64)
        exactly.assert_quantised(found, exact, 4, 1e-5)


ROWS = (api.quantize_rows, api.gelu_quantize_rows, api.modulate_quantize_rows)


@pytest.mark.parametrize("op", ROWS, ids=lambda op: op.__name__)
def test_what_the_row_kernel_cannot(op):
    args = calls()[op]
    for wrong in ((x.astype(jnp.float16) for x in args), (args[0][:, :0], *args[1:])):
        wrong = tuple(wrong)
        op(*wrong)
        with pytest.raises(NotImplementedError):
            op(*wrong, implementation="interpret")
    for implementation in ("xla", "interpret"):
        with pytest.raises(ValueError, match="int32"):
            op(args[0].astype(jnp.int32), *args[1:], implementation=implementation)
        with pytest.raises(ValueError, match="rotation 64 does not divide k = 200"):
            op(*args, rotation=64, implementation=implementation)


@pytest.mark.parametrize("implementation", ("xla", "interpret"))
def test_wrong_operands_are_refused_by_every_backend(implementation):
    x, w, x_scale, w_scale = calls()[api.int8_matmul]
    with pytest.raises(ValueError, match=r"w_scale must have shape \(5\), got \(4,\)"):
        api.int8_matmul(x, w, x_scale, w_scale[:4], implementation=implementation)
    with pytest.raises(ValueError, match="200 ternary codes take 64 bytes, w has 200"):
        api.ternary_matmul(x, w.view(jnp.uint8), x_scale, w_scale, implementation=implementation)
