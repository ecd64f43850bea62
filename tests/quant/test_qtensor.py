"""QTensor: what it stores, to the byte; what it stands for; that it is an ordinary pytree node."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.quant.qtensor import LAYOUT_VERSION, QTensor, is_qtensor, spread, tree_bytes
from pallas_kernels.formats import FORMATS, pack_codes, unpack_codes


def random_codes(format, *shape, seed=0):
    spec = FORMATS[format]
    rng = np.random.default_rng(seed)
    codes = rng.integers(spec.low, spec.high, shape, np.int8, endpoint=True)
    codes.flat[:2] = spec.low, spec.high
    return codes


def random_qtensor(format, n=5, k=130, group=None, asymmetric=False, layers=(), seed=0):
    """(QTensor, its codes, the float32 matrix it stands for by a loop over inputs)."""
    rng = np.random.default_rng(seed)
    size = group or k
    groups = -(-k // size)
    codes = random_codes(format, *layers, n, k, seed=seed)
    scale = rng.uniform(0.5, 2, (*layers, n, groups)).astype(np.float32)
    zero = random_codes(format, *layers, n, groups, seed=seed + 1) if asymmetric else None
    exact = np.empty(codes.shape, np.float32)
    for i in range(k):
        shift = zero[..., i // size].astype(np.float32) if asymmetric else 0
        exact[..., i] = (codes[..., i] - shift) * scale[..., i // size]
    packed = pack_codes(jnp.asarray(codes), format)
    return QTensor(packed, scale, zero, format, (n, k), size), codes, exact


@pytest.mark.parametrize("format", FORMATS)
def test_every_code_of_a_format_survives_packing(format):
    spec = FORMATS[format]
    codes = np.arange(spec.low, spec.high + 1, dtype=np.int8)
    codes = np.tile(codes, (2, 3, 60))[..., : max(131, len(codes))]
    packed = pack_codes(jnp.asarray(codes), format)
    assert packed.dtype == (jnp.int8 if spec.bits == 8 else jnp.uint8)
    back = unpack_codes(packed, format, codes.shape[-1])
    assert back.dtype == jnp.int8
    np.testing.assert_array_equal(back, codes)
    assert spec.high - spec.low < 2**spec.bits


@pytest.mark.parametrize("layers", [(), (3,), (2, 2)])
@pytest.mark.parametrize("asymmetric", (False, True))
@pytest.mark.parametrize("group", (None, 64, 7))
@pytest.mark.parametrize("format", FORMATS)
def test_dequantize_equals_numpy(format, group, asymmetric, layers):
    """Equality: one exact difference of integers and one float32 product per weight."""
    q, codes, exact = random_qtensor(format, 5, 130, group, asymmetric, layers)
    np.testing.assert_array_equal(q.unpacked(), codes)
    out = q.dequantize()
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, exact)
    np.testing.assert_array_equal(q.dequantize(jnp.bfloat16), exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("asymmetric", (False, True))
def test_one_scale_per_tensor_stands_for_all_of_it(asymmetric):
    codes = random_codes("int4", 2, 5, 9)
    scale = np.array([[[0.5]], [[2.0]]], np.float32)
    zero = np.array([[[3]], [[-8]]], np.int8) if asymmetric else None
    q = QTensor(pack_codes(jnp.asarray(codes), "int4"), scale, zero, "int4", (5, 9), 9)
    shift = zero.astype(float) if asymmetric else 0
    np.testing.assert_array_equal(q.dequantize(), (codes - shift) * scale)


@pytest.mark.parametrize(
    ("format", "group", "asymmetric", "layers", "nbytes"),
    [
        # 5 rows of 130 codes: two blocks of 128, except in int8
        ("ternary", None, False, (), 5 * 2 * 32 + 5 * 4),
        ("int4", None, False, (), 5 * 2 * 64 + 5 * 4),
        ("int6", None, False, (), 5 * 2 * 96 + 5 * 4),
        ("int8", None, False, (), 5 * 130 + 5 * 4),
        ("int8", None, True, (), 5 * 130 + 5 * (4 + 1)),
        ("int4", 64, True, (), 5 * 2 * 64 + 5 * 3 * (4 + 1)),
        ("int4", 64, True, (3,), 3 * (5 * 2 * 64 + 5 * 3 * (4 + 1))),
        ("ternary", None, False, (2, 3), 6 * (5 * 2 * 32 + 5 * 4)),
    ],
)
def test_nbytes_by_hand(format, group, asymmetric, layers, nbytes):
    q = random_qtensor(format, 5, 130, group, asymmetric, layers)[0]
    assert q.nbytes == nbytes
    assert q.layers == int(np.prod(layers, dtype=int))
    assert jax.eval_shape(lambda: q).nbytes == nbytes  # from shapes alone
    stored = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(q))
    assert stored == nbytes  # nothing narrower than a byte is stored


def test_tree_bytes_counts_every_leaf():
    q = random_qtensor("ternary")[0]
    tree = {"kernel": q, "bias": jnp.zeros(5, jnp.bfloat16), "scale": np.zeros((2, 3), np.float32)}
    assert tree_bytes(tree) == q.nbytes + 10 + 24
    assert tree_bytes({}) == 0


def test_tree_map_stack_and_slice_keep_what_is_static():
    q = random_qtensor("int4", group=64, asymmetric=True)[0]
    assert len(jax.tree.leaves(q)) == 3
    assert len(jax.tree.leaves(random_qtensor("int8")[0])) == 2  # no zero point, no leaf
    others = [random_qtensor("int4", group=64, asymmetric=True, seed=i) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(other[0] for other in others))
    assert (stacked.shape, stacked.group, stacked.format) == ((5, 130), 64, "int4")
    assert (stacked.layers, stacked.layout_version) == (3, LAYOUT_VERSION)
    np.testing.assert_array_equal(stacked.dequantize(), np.stack([other[2] for other in others]))
    second = jax.tree.map(lambda leaf: leaf[1], stacked)
    assert jax.tree.structure(second) == jax.tree.structure(q)
    np.testing.assert_array_equal(second.dequantize(), others[1][2])


def test_scan_and_vmap_see_one_layer_at_a_time():
    q, _, exact = random_qtensor("ternary", group=64, layers=(3,))

    def step(total, layer):
        assert layer.shape == (5, 130)
        assert layer.layers == 1
        w = layer.dequantize()
        return total + w, w

    total, each = jax.jit(lambda q: jax.lax.scan(step, jnp.zeros((5, 130)), q))(q)
    np.testing.assert_array_equal(each, exact)
    np.testing.assert_array_equal(total, (exact[0] + exact[1]) + exact[2])
    np.testing.assert_array_equal(jax.vmap(lambda layer: layer.dequantize())(q), exact)


def test_what_differs_statically_is_another_tree():
    base = random_qtensor("int8")[0]
    leaves = (base.codes, base.scale, None)
    structures = {
        jax.tree.structure(QTensor(*leaves, *static))
        for static in [
            ("int8", (5, 130), 130, None, 1),
            ("int8", (5, 130), 130, 8, 1),
            ("int8", (5, 130), 130, 4, 1),
            ("int8", (5, 130), 130, None, 2),
            ("int8", (5, 130), 65, None, 1),
            ("int8", (5, 129), 130, None, 1),
            ("int6", (5, 130), 130, None, 1),
        ]
    }
    assert len(structures) == 7


def test_it_is_frozen_and_known_to_tree_maps():
    q = random_qtensor("int8")[0]
    with pytest.raises(AttributeError):
        q.group = 3
    assert [is_qtensor(value) for value in (q, q.codes, None)] == [True, False, False]
    nodes = jax.tree.leaves({"a": q, "b": 1}, is_leaf=is_qtensor)
    assert nodes[0] is q


def test_spread_repeats_each_group_and_cuts_the_tail():
    values = jnp.asarray([[1, 2, 3]])
    assert spread(values, 2, 5).tolist() == [[1, 1, 2, 2, 3]]
    assert spread(values[:, :1], 5, 5).tolist() == [[1]]
