"""Choosing among compiled candidates, and writing the table; nothing is compiled here."""

import dataclasses
import importlib.util

import pytest

from pallas_kernels import tile_table, tune
from pallas_kernels.audit.cases import TUNED
from pallas_kernels.audit.timing import Block
from pallas_kernels.tiles import Tile
from tests.references.findings import GOOD

OP = TUNED["int8_a8"]
CYCLES = dict.fromkeys(("tensor", "issue", "alu", "fma", "xu", "shared"), 0.0)


def candidate(tile, *, alu=0.0, warps=16, blocks=2, **changes):
    """A clean candidate whose loop does what its tile asks of the tensor pipe, and `alu` cycles."""
    tensor = tile.m * tile.n * tile.k / tile.num_warps / 512  # 512 products a cycle
    loop = CYCLES | {"tensor": tensor, "alu": alu * tensor}
    reads = float((tile.m + tile.n) * tile.k)
    found = dataclasses.replace(
        GOOD,
        tile=tile,
        blocks_per_sm=blocks,
        warps_per_sm=warps,
        block=Block(
            loop=loop,
            rest=CYCLES,
            num_warps=tile.num_warps,
            resident=blocks,
            reads=reads,
            in_flight=1e6,
        ),
        k_per_pass=float(tile.k),
    )
    return tune.Candidate(tile, dataclasses.replace(found, **changes))


LARGE, SMALL = Tile(128, 256, 64, 8, 3), Tile(64, 64, 64, 4, 4)


def test_few_blocks_take_the_smaller_tile_and_many_do_not_lose_by_the_larger():
    found = [candidate(LARGE), candidate(SMALL, alu=1.2)]
    assert tune.choose(OP, found, 256, 64).tile == SMALL  # 128 x 256 leaves most SMs without work
    assert tune.choose(OP, found, tile_table.ANY, 1024).tile == LARGE


@pytest.mark.parametrize("flaw", [{"spill_bytes": 4}, {"byte_loads": 1}])
def test_unclean_code_is_never_chosen(flaw):
    slow = candidate(SMALL, alu=9.0)
    assert tune.choose(OP, [candidate(LARGE, **flaw), slow], tile_table.ANY, 1024) == slow
    with pytest.raises(ValueError, match="int8_a8"):
        tune.choose(OP, [candidate(LARGE, **flaw)], tile_table.ANY, 1024)


def test_a_bound_under_the_floor_is_chosen_only_without_others():
    low, slow = candidate(LARGE, bound=0.94), candidate(SMALL, alu=9.0)
    assert tune.choose(OP, [low, slow], tile_table.ANY, 1024) == slow
    assert tune.choose(OP, [low], tile_table.ANY, 1024) == low
    elsewhere = candidate(LARGE, bound=0.94, target="h100")
    assert tune.choose(OP, [elsewhere, slow], tile_table.ANY, 1024) == elsewhere


def test_too_few_warps_are_chosen_only_without_others():
    few, slow = candidate(LARGE, warps=4, blocks=1), candidate(SMALL, alu=9.0)
    assert tune.choose(OP, [few, slow], tile_table.ANY, 1024) == slow
    assert tune.choose(OP, [few], tile_table.ANY, 1024) == few


def test_among_equals_two_blocks_an_sm_win():
    other = dataclasses.replace(LARGE, num_stages=4)
    found = [candidate(LARGE, blocks=1), candidate(other, blocks=2)]
    assert tune.choose(OP, found, tile_table.ANY, 1024).tile == other


def test_shapes_are_the_layers_of_the_range():
    assert {m for m, *_ in tune.shapes(16, 0)} == {1}
    assert {m for m, *_ in tune.shapes(64, 16)} == {64}  # no layer: the range's end
    assert {m for m, *_ in tune.shapes(1024, 256)} == {1024}
    assert {m for m, *_ in tune.shapes(tile_table.ANY, 1024)} == {4096, 4608}


@pytest.mark.parametrize("few_rows", [True, False])
@pytest.mark.parametrize("name", TUNED)
def test_candidates_are_tiles_the_kernel_takes(name, few_rows):
    tiles = list(tune.candidates(TUNED[name], few_rows))
    assert len(tiles) == len(set(tiles)) > 3
    for tile in tiles:
        assert (tile.m == 16) == few_rows
        assert TUNED[name].format == "int8" or tile.k == 128


def test_the_table_is_written_as_a_module_and_its_head_kept(tmp_path):
    path = tmp_path / "table.py"
    path.write_text(tune.TABLE.read_text(encoding="utf-8"), encoding="utf-8")
    entries = [(16, SMALL), (tile_table.ANY, LARGE)]
    tune.write({"sm_80": {"int8_a8": entries}}, path)
    spec = importlib.util.spec_from_file_location("written", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert {"sm_80": {"int8_a8": tuple(entries)}} == module.TILES
    assert module.__doc__ == tile_table.__doc__ and module.ANY == tile_table.ANY


def test_tuning_compiles_every_candidate_and_joins_equal_neighbours(monkeypatch):
    asked = []

    def attempt_all(jobs, workers):
        for case, target, tile in jobs:
            asked.append((case.m, target, tile))
            yield candidate(tile, alu=0.0 if tile.n == 64 and tile.m <= 64 else 5.0).found

    monkeypatch.setattr(tune, "attempt_all", attempt_all)
    entries = tune.tune(OP, "a100", 1)
    expected = [*tune.candidates(OP, True)], [*tune.candidates(OP, False)]
    assert [tile for *_, tile in asked] == [*expected[0], *expected[1]]
    assert {m for m, *_ in asked} == {1, 4608}
    assert [most for most, _ in entries] == [16, tile_table.ANY]
