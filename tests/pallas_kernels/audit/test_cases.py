"""The case list: the networks' own shapes, every op, operands the kernels accept."""

import jax
import pytest

from lowbit_jax.models import dit, flux
from pallas_kernels.audit.cases import LAYERS, MAIN, OPS, TUNED, Case, Matmul, cases, find_op
from pallas_kernels.tile_table import ANY, TILES
from pallas_kernels.tiles import Tile, power_of_two


def test_every_op_has_its_main_shapes_and_every_layer():
    main, full = cases(), cases(full=True)
    assert {case.op for case in main} == {case.op for case in full} == set(OPS)
    assert len(full) == len(set(full)) > 3 * len(main)
    layers = {(k, n) for _, k, n, _ in LAYERS}
    assert {(c.k, c.n) for c in full if c.op == "int8_a8"} == layers
    assert {(k, n) for _, k, n in MAIN} <= layers


def test_only_the_ops_asked_for():
    assert {case.op for case in cases(("int4_a8", "quantize_rows"))} == {"int4_a8", "quantize_rows"}
    with pytest.raises(ValueError, match="int5.*int8_a8"):
        cases(("int5",))


@pytest.mark.parametrize("name", OPS)
def test_operands_are_what_the_kernel_takes(name):
    op = OPS[name]
    m, k, n = (4608, 3072, 9216) if isinstance(op, Matmul) else (4608, 3072, 0)
    fn, specs, tile = op.build(m, k, n, "sm_80", None)
    found = jax.eval_shape(fn, *specs)
    if isinstance(op, Matmul):
        assert found.shape == (m, n) and isinstance(tile, Tile)
    else:
        assert found.codes.shape[-2:] == (m, k) and tile is None


def test_a_tile_can_be_forced():
    forced = Tile(64, 64, 128, 4, 3)
    assert OPS["ternary_a8"].build(64, 256, 64, "sm_80", forced)[2] == forced


def test_every_entry_of_the_tile_table_is_tuned_and_covers_every_m():
    for generation, ops in TILES.items():
        assert set(ops) == set(TUNED), generation
        for entries in ops.values():
            limits = [most for most, _ in entries]
            assert limits == sorted(set(limits)) and limits[-1] == ANY
            for _, tile in entries:
                assert all(size == power_of_two(size) for size in (tile.m, tile.n, tile.k))


def test_audited_ops_take_the_tile_of_their_table_entry():
    assert find_op("int4_a8_group128").table == "int4_a8_grouped"
    assert find_op("int6_a16_grouped") is TUNED["int6_a16_grouped"]
    assert Case("int8_a8", 1, 2, 3).shape == "1 x 2 x 3"


@pytest.mark.parametrize(
    ("network", "params"),
    [
        ("FLUX", flux.abstract_params(flux.FLUX_DEV)),
        ("DiT", dit.abstract_params(dit.DIT_XL_2_512)),
    ],
)
def test_layers_are_linears_of_the_networks(network, params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    kernels = {leaf.shape[-2:] for path, leaf in leaves if "kernel" in jax.tree_util.keystr(path)}
    for name, k, n, _ in LAYERS:
        if network in name:
            assert (k, n) in kernels, name
