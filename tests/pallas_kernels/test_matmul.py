"""The matmul kernel in interpret mode: its integer sums equal NumPy's, the rest float64's.

Machine code is read in tests/pallas_kernels/audit; correctness on a GPU is `make gpu-check`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import api, matmul, reference
from pallas_kernels.formats import FORMATS, pack_codes
from pallas_kernels.matmul_plan import choose_tile
from pallas_kernels.operands import prepare
from pallas_kernels.rows import QuantizedRows
from pallas_kernels.tile_table import TILES
from pallas_kernels.tiles import Tile
from tests.references.matmul import product

FORMAT = pytest.mark.parametrize("format", FORMATS)
EPS = np.finfo(np.float32).eps


def operands(case):
    return prepare(*case.args, **case.keywords, out_dtype=jnp.float32)


def kernel(case, **options):
    return np.asarray(matmul.matmul(operands(case), interpret=True, **options)).astype(float)


def assert_exact(case, **options):
    """With scales of 1 and no float operand every backend gives the integer itself."""
    np.testing.assert_array_equal(kernel(case, **options), case.exact()[0])
    xla = reference.matmul(operands(case))
    np.testing.assert_array_equal(xla, case.exact()[0])


def assert_close(case, per_term=4 * EPS, **options):
    """Float32 rounding of every product and sum: a few eps of the sum of magnitudes."""
    exact, size = case.exact()
    np.testing.assert_array_less(np.abs(kernel(case, **options) - exact), per_term * size + 1e-30)


# every pair of an m, an n and a k once; k ends inside a block of 128 and inside a run of 32
SHAPES = [
    *((1, 1, 64), (1, 5, 129), (1, 257, 1152)),
    *((3, 5, 64), (3, 257, 129), (3, 1, 1152)),
    *((130, 257, 64), (130, 1, 129), (130, 5, 1152)),
]


@FORMAT
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_integer_sums_are_exact(format, m, n, k):
    assert_exact(product(format, m, n, k, unit_scales=True, seed=m + n + k))


@settings(max_examples=12, deadline=None)
@given(
    format=st.sampled_from(list(FORMATS)),
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    k=st.integers(1, 300),
    group=st.sampled_from([None, 64, 128, 256]),
    asymmetric=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_sums_exactly(format, m, n, k, group, asymmetric, seed):
    options = dict(group=group, asymmetric=asymmetric, unit_scales=True, seed=seed)
    assert_exact(product(format, m, n, k, **options))


@FORMAT
@pytest.mark.parametrize("x", (-127, 127))
@pytest.mark.parametrize("group", (None, 128))
def test_extreme_codes(format, x, group):
    """Every code at an end of its range, and the zero point at the other: the largest sums."""
    spec, (m, n, k) = FORMATS[format], (2, 3, 384)
    case = product(format, m, n, k, group=group, asymmetric=True, unit_scales=True)
    codes = jnp.full((m, k), x, jnp.int8).at[1].set(0)
    sums = jnp.sum(codes, axis=1, keepdims=True, dtype=jnp.int32)
    zero = jnp.full_like(case.options["zero"], spec.high)
    w = np.full((n, k), spec.low, np.int8)
    case = case._replace(
        x=case.x._replace(codes=codes, sums=sums),
        values=np.asarray(codes, np.int64),
        codes=w,
        options=case.options | {"zero": zero, "w": pack_codes(jnp.asarray(w), format)},
    )
    assert case.exact()[0][0, 0] == x * k * (spec.low - spec.high)
    assert_exact(case)


@FORMAT
@pytest.mark.parametrize("integer", (True, False))
@pytest.mark.parametrize(("group", "asymmetric"), [(None, False), (None, True), (128, True)])
def test_scales_and_epilogue(format, integer, group, asymmetric):
    options = dict(group=group, asymmetric=asymmetric, integer=integer)
    case = product(format, 34, 70, 300, bias=True, gates=2, residual=True, **options)
    assert_close(case)
    assert_close(product(format, 34, 70, 300, **options))


@pytest.mark.parametrize("gates", (1, 2, 4))
def test_gates_that_fit_the_tiles_and_that_do_not(gates):
    """Tiles of 16 rows: 64 / 4 fit; 24 rows per gate do not, and take the plain epilogue."""
    tile = Tile(16, 32, 128, 4, 2)
    for m in (64, 96):
        case = product("int4", m, 40, 130, gates=gates, residual=True, bias=True)
        assert_close(case, tile=tile)


def test_a_gate_is_its_own_rows():
    """Entry 1 gates the second half of the rows only."""
    case = product("int8", 8, 5, 64, gates=2)
    gate = jnp.stack([jnp.zeros(5), jnp.ones(5)]).astype(jnp.bfloat16)
    case = case._replace(options=case.options | {"gate": gate})
    y = kernel(case)
    assert not y[:4].any() and y[4:].any()


@FORMAT
@pytest.mark.parametrize("integer", (True, False))
def test_output_dtype(format, integer):
    case = product(format, 3, 70, 96, integer=integer, bias=True)
    y = matmul.matmul(operands(case), out_dtype=jnp.bfloat16, interpret=True)
    assert y.dtype == jnp.bfloat16
    exact, size = case.exact()
    np.testing.assert_allclose(y.astype(float), exact, rtol=2**-8, atol=4 * EPS * size.max())


@FORMAT
def test_a_non_finite_scale_is_not_hidden(format):
    case = product(format, 2, 3, 64)
    x = case.x._replace(scale=case.x.scale.at[0].set(jnp.nan), codes=case.x.codes.at[0].set(0))
    y = kernel(case._replace(x=x))
    assert np.isnan(y[0]).all() and np.isfinite(y[1]).all()


@pytest.mark.parametrize("tile", [Tile(16, 32, 32, 4, 2), Tile(32, 16, 256, 4, 2)])
def test_any_tile(tile):
    assert_exact(product("int8", 33, 40, 129, unit_scales=True), tile=tile)


@FORMAT
@pytest.mark.parametrize("op", ("a8", "a16", "a8_grouped", "a16_grouped"))
def test_every_tile_of_the_table(format, op):
    """The tile that the table chooses for each range of m gives the right product."""
    for ops in TILES.values():
        for _, tile in dict.fromkeys(ops[f"{format}_{op}"]):
            options = dict(integer=op.startswith("a8"), group=128 if "grouped" in op else None)
            case = product(format, tile.m + 1, 17, 256, asymmetric=True, **options)
            assert_close(case, tile=tile)


def test_few_rows_take_a_small_tile():
    sizes = []
    for m in (1, 16, 17, 4608):
        sizes.append(choose_tile(operands(product("ternary", m, 2, 128))).m)
    assert sizes[0] == sizes[1] == 16 and sizes[2] > 16 and sizes[3] >= 64


def test_what_the_kernel_cannot():
    for case, message in [
        (product("int8", 0, 3, 64), r"\(0, 64\)"),
        (product("int4", 2, 3, 256, group=96), "groups of 96"),
        (product("int4", 2, 3, 256, group=32), "groups of 32"),
    ]:
        with pytest.raises(NotImplementedError, match=message):
            kernel(case)
    case = product("int8", 2, 3, 64, integer=False)
    with pytest.raises(NotImplementedError, match="not float32"):
        kernel(case._replace(x=case.x.astype(jnp.float32)))


def test_what_the_kernel_cannot_runs_in_xla():
    """`implementation=None` never refuses."""
    for case in (product("int4", 2, 3, 256, group=96), product("int8", 3, 5, 64, integer=False)):
        exact, size = case.exact()
        y = api.matmul(*case.args, **case.keywords)
        np.testing.assert_allclose(y, exact, atol=2e-2 * size.max())


SMALL = dict(format="int4", m=2, n=3, k=64)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"format": "int5"}, "format must be one of int8, int6, int4, ternary, got 'int5'"),
        ({"w": np.zeros((3, 64), np.int8)}, "w must be uint8, got int8"),
        ({"w": np.zeros((3, 32), np.uint8)}, "64 int4 codes take 64 bytes a row, w has 32"),
        ({"scale": np.ones(3, np.float32)}, r"scale must have shape \(any, any\), got \(3,\)"),
        ({"scale": np.ones((4, 1), np.float32)}, r"scale must have shape \(3, 1\), got \(4, 1\)"),
        ({"scale": np.ones((3, 1), np.float16)}, "scale must be float32, got float16"),
        ({"scale": np.ones((3, 2), np.float32)}, "scale has 2 groups a row; group says None"),
        ({"scale": np.ones((3, 2), np.float32), "group": 16}, r"scale must have shape \(3, 4\)"),
        ({"zero": np.ones((3, 2), np.int8)}, r"zero must have shape \(3, 1\), got \(3, 2\)"),
        ({"zero": np.ones((3, 1), np.int32)}, "zero must be int8, got int32"),
        ({"bias": np.ones(4, np.float32)}, r"bias must have shape \(3\), got \(4,\)"),
        ({"bias": np.ones(3, np.int32)}, "bias must be floating, got int32"),
        ({"gate": np.ones((3, 3), np.float32)}, "gate has 3 rows, not a divisor of the 2 of x"),
        ({"gate": np.ones((1, 4), np.float32)}, r"gate must have shape \(any, 3\), got \(1, 4\)"),
        ({"residual": np.ones((3, 3), np.float32)}, r"residual must have shape \(2, 3\)"),
        ({"out_dtype": jnp.int32}, "float32 or bfloat16, got int32"),
    ],
)
@pytest.mark.parametrize("implementation", ("xla", "interpret", None))
def test_wrong_operands_are_refused_by_every_backend(wrong, message, implementation):
    case = product(**SMALL)
    names = dict(zip(("x", "w", "scale"), case.args, strict=True))
    with pytest.raises(ValueError, match=message):
        api.matmul(**(names | case.keywords | wrong), implementation=implementation)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("codes", np.zeros((2, 64), np.uint8), "x.codes must be int8, got uint8"),
        ("codes", np.zeros((2, 1, 64), np.int8), r"x.codes must have shape \(any, any\)"),
        ("codes", np.zeros((2, 200), np.int8), "200 int4 codes take 128 bytes a row, w has 64"),
        ("scale", np.ones(2, np.float32), r"x.scale must have shape \(2, 1\), got \(2,\)"),
        ("sums", np.ones((2, 1), np.float32), "x.sums must be int32, got float32"),
        ("sums", np.ones((3, 1), np.int32), r"x.sums must have shape \(2, 1\), got \(3, 1\)"),
    ],
)
def test_wrong_rows_are_refused(part, value, message):
    case = product(**SMALL)
    with pytest.raises(ValueError, match=message):
        api.matmul(case.x._replace(**{part: value}), *case.args[1:], **case.keywords)


def test_integers_are_refused_as_floating_activations():
    case = product(**SMALL)
    with pytest.raises(ValueError, match="x must be floating, got int8"):
        api.matmul(case.x.codes, *case.args[1:], **case.keywords)


@FORMAT
@pytest.mark.parametrize("integer", (True, False))
@pytest.mark.parametrize("group", (None, 64, 128))
def test_lowers_for_cuda(lower_for_cuda, format, integer, group):
    """Interpret mode takes more than Triton does: every variant, whole tiles and tails."""
    for m, n, k in ((1, 257, 300), (130, 257, 300), (4608, 3072, 3072)):
        case = jax.eval_shape(
            lambda m=m, n=n, k=k: operand_arrays(format, m, n, k, group=group, integer=integer)
        )
        static = {"format": format, "group": group, "out_dtype": jnp.bfloat16}
        lower_for_cuda(lambda case, s=static: matmul.matmul(prepare(**case, **s)), case)


def operand_arrays(format, m, n, k, *, group, integer):
    """The arrays `prepare` takes, made inside a trace: nothing is computed."""
    groups = -(-k // group) if group else 1
    codes = jnp.zeros((m, k), jnp.int8)
    rows = QuantizedRows(codes, jnp.ones((m, 1), jnp.float32), jnp.zeros((m, 1), jnp.int32))
    spec = FORMATS[format]
    return {
        "x": rows if integer else jnp.zeros((m, k), jnp.bfloat16),
        "w": jnp.zeros((n, spec.stored_size(k)), spec.dtype),
        "scale": jnp.ones((n, groups), jnp.float32),
        "zero": jnp.zeros((n, groups), jnp.int8),
        "bias": jnp.zeros(n, jnp.bfloat16),
        "gate": jnp.zeros((1, n), jnp.bfloat16),
        "residual": jnp.zeros((m, n), jnp.bfloat16),
    }


def test_named_ops_are_the_one_op():
    for format in FORMATS:
        case = product(format, 3, 5, 70, bias=True)
        named = getattr(api, f"{format}_matmul")
        keywords = {key: value for key, value in case.keywords.items() if key != "format"}
        run = functools.partial(named, *case.args, **keywords)
        np.testing.assert_array_equal(
            run(implementation="xla"), api.matmul(*case.args, **case.keywords, implementation="xla")
        )
