"""Which backend runs, and what each of them refuses."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import api, dispatch
from tests.references import rows as exactly
from tests.references.matmul import product

M, K = 3, 200
ROWS = (api.quantize_rows, api.gelu_quantize_rows, api.modulate_quantize_rows)
FORMATS = ("int8", "int4", "ternary")


def row_args(op):
    rng = np.random.default_rng(0)
    shapes = [(2, M, K), (2, K), (2, K)] if op is api.modulate_quantize_rows else [(2, M, K)]
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


def calls():
    """[(name, op(*operands, implementation=...), operands)]; sums stay exact on every backend."""
    found = [(op.__name__, op, row_args(op)) for op in ROWS]
    for format in FORMATS:
        case = product(format, M, 5, K, asymmetric=True)

        def multiply(x, w, scale, zero, implementation=None, format=format):
            return api.matmul(x, w, scale, zero, format=format, implementation=implementation)

        found.append((f"{format}_matmul", multiply, (*case.args, case.options["zero"])))
    return found


OPS = pytest.mark.parametrize(("op", "args"), [c[1:] for c in calls()], ids=[c[0] for c in calls()])
INEXACT = (api.gelu_quantize_rows, api.modulate_quantize_rows)  # float32 in between


@OPS
def test_backends_agree(op, args):
    by_default, xla, kernel = (
        jax.tree.leaves(jax.jit(lambda *a, i=i: op(*a, implementation=i))(*args))
        for i in (None, "xla", "interpret")
    )
    for a, b, c in zip(by_default, xla, kernel, strict=True):
        assert a.dtype == b.dtype == c.dtype and a.shape == b.shape == c.shape
        np.testing.assert_array_equal(a, b)
        if op not in INEXACT:
            np.testing.assert_allclose(b, c, rtol=1e-6)


@OPS
def test_one_trace_serves_cpu_and_cuda(op, args, lower_for_cuda):
    """Lowered for a CPU there is no kernel in the program; lowered for CUDA there is."""
    assert "triton" not in jax.jit(op).lower(*args).as_text()
    lower_for_cuda(op, *args)
    forced = jax.jit(lambda *a: op(*a, implementation="xla")).trace(*args)
    assert "triton" not in forced.lower(lowering_platforms=("cuda",)).as_text()


def test_a_program_for_cuda_falls_back_where_the_kernel_cannot():
    case = product("int4", 3, 5, K, integer=False)
    x = case.x.astype(jnp.float32)
    f = jax.jit(lambda x, w, s: api.int4_matmul(x, w, s))
    text = f.trace(x, *case.args[1:]).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" not in text and "dot_general" in text


@OPS
def test_triton_needs_a_cuda_device(op, args, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with pytest.raises(NotImplementedError, match="the platform is cpu"):
        op(*args, implementation="triton")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for capability in ("7.5", "gfx942"):
        device = SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        with pytest.raises(NotImplementedError, match=f"the device has {capability}"):
            op(*args, implementation="triton")
        fresh = jax.make_jaxpr(lambda *a: op(*a))(*args)  # nothing traced before
        assert "pallas" not in str(fresh)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability="8.0")])
    traced = jax.make_jaxpr(lambda *a: op(*a, implementation="triton"))(*args)
    assert "pallas_call" in str(traced)


@pytest.mark.parametrize(
    ("capability", "generation"), [("8.0", "sm_80"), ("8.9", "sm_89"), ("9.0", "sm_90")]
)
def test_tiles_are_those_of_this_gpu(monkeypatch, capability, generation):
    assert dispatch.generation() == "sm_80"  # without a GPU: what programs are compiled for
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    device = SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert dispatch.generation() == generation


@OPS
def test_an_unknown_implementation(op, args):
    with pytest.raises(ValueError, match="'cuda'"):
        op(*args, implementation="cuda")


@pytest.mark.parametrize("implementation", ("xla", "interpret"))
def test_rows_take_bits_mask_and_rotation(implementation):
    """The second image's last row: no axis is lost, no argument left behind."""
    x, shift, scale = row_args(api.modulate_quantize_rows)
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


@pytest.mark.parametrize("op", ROWS, ids=lambda op: op.__name__)
def test_what_the_row_kernel_cannot(op):
    args = row_args(op)
    for wrong in ((x.astype(jnp.float16) for x in args), (args[0][:, :0], *args[1:])):
        wrong = tuple(wrong)
        op(*wrong)
        with pytest.raises(NotImplementedError):
            op(*wrong, implementation="interpret")
    for implementation in ("xla", "interpret", None):
        with pytest.raises(ValueError, match="int32"):
            op(args[0].astype(jnp.int32), *args[1:], implementation=implementation)
        with pytest.raises(ValueError, match="rotation 64 does not divide k = 200"):
            op(*args, rotation=64, implementation=implementation)
