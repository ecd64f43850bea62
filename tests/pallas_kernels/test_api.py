"""Which backend runs, and what each of them refuses."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import api, packing, reference

M, N, K = 3, 5, 200


def calls():
    """{op: its arguments}; |sums| stay below 2^24, where every backend is exact."""
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(-127, 128, (M, K)), jnp.int8)
    w = jnp.asarray(rng.integers(-127, 128, (N, K)), jnp.int8)
    trits = packing.pack(jnp.asarray(rng.integers(0, 3, (N, K)), jnp.uint8), 2)
    scales = jnp.asarray(rng.uniform(size=(M, 1)), jnp.float32), jnp.ones(N, jnp.float32) / 3
    return {
        api.quantize_rows: (jnp.asarray(rng.standard_normal((M, K)), jnp.float32),),
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
        assert a.dtype == b.dtype == c.dtype
        np.testing.assert_array_equal(a, b)
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


def test_rows_with_leading_axes():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 40)), jnp.float32)
    found = api.quantize_rows(x, 6, implementation="interpret")
    for a, b in zip(found, reference.quantize_rows(x, 6), strict=True):
        assert a.shape == b.shape
        np.testing.assert_array_equal(a, b)


def test_what_the_quantise_kernel_cannot():
    for x in (jnp.ones((2, 8), jnp.float16), jnp.ones((0, 8))):
        api.quantize_rows(x)
        with pytest.raises(NotImplementedError):
            api.quantize_rows(x, implementation="interpret")
    with pytest.raises(ValueError, match="int32"):
        api.quantize_rows(jnp.ones((2, 8), jnp.int32))


@pytest.mark.parametrize("implementation", ("xla", "interpret"))
def test_wrong_operands_are_refused_by_every_backend(implementation):
    x, w, x_scale, w_scale = calls()[api.int8_matmul]
    with pytest.raises(ValueError, match=r"w_scale must have shape \(5\), got \(4,\)"):
        api.int8_matmul(x, w, x_scale, w_scale[:4], implementation=implementation)
    with pytest.raises(ValueError, match="200 ternary codes take 64 bytes, w has 200"):
        api.ternary_matmul(x, w.view(jnp.uint8), x_scale, w_scale, implementation=implementation)
