"""The model of an SM against numbers worked out by hand and published ones."""

from pathlib import Path

import pytest

from pallas_kernels.audit import sass
from pallas_kernels.audit.model import occupancy, pipes
from pallas_kernels.audit.targets import SUB_PARTITIONS, TARGETS, target
from pallas_kernels.audit.timing import DRAM_LATENCY, Block, times

FIXTURES = Path(__file__).parent / "fixtures"
A100 = target("a100")


def main_loop(name):
    (found,) = sass.parse((FIXTURES / f"{name}.sass").read_text(encoding="utf-8")).values()
    return found.main


def region(*opcodes):
    return sass.Region([sass.Instruction(16 * i, "", op, "") for i, op in enumerate(opcodes)])


@pytest.mark.parametrize(
    ("name", "int8_tops", "bf16_tflops"),
    [("a100", 624, 312), ("a10", 250, 125), ("l20", 239, 119.5), ("h100", 1979, 989)],
)
def test_tensor_rates_are_the_published_peaks(name, int8_tops, bf16_tflops):
    gpu = TARGETS[name]
    cycles = 2 * SUB_PARTITIONS * gpu.sms * gpu.clock_ghz * 1e9
    assert gpu.int8_macs * cycles == pytest.approx(int8_tops * 1e12, rel=0.01)
    assert gpu.bf16_macs * cycles == pytest.approx(bf16_tflops * 1e12, rel=0.01)


def test_int8_loop_by_hand():
    found = pipes(main_loop("int8_128x128x64"), A100)
    assert found.tensor == 32 * 16 * 8 * 32 / 512  # 32 products of 8 cycles
    # 12 ldmatrix of 512 bytes and 4 copies of 512, at 32 bytes a cycle and sub-partition
    assert found.shared == (12 * 512 + 4 * 512) / 32
    assert found.issue == 86
    assert found.half == found.xu == 0
    assert found.bound == 1.0
    assert found.busiest == ("tensor", 256)


def test_byte_loads_are_bound_by_unpacking():
    found = pipes(main_loop("byte_loads"), A100)
    assert found.tensor == 2 * 8
    assert found.busiest[0] == "alu" and found.bound < 0.2


def test_one_instruction_of_every_pipe():
    kinds = "IMMA.16832.S8.S8 LOP3.LUT IMAD FFMA I2F HFMA2.BF16_V2 LDS.U8 STS.128 BRA".split()
    on_a100, on_a10 = pipes(region(*kinds), A100), pipes(region(*kinds), target("a10"))
    assert on_a100.cycles == {
        "tensor": 8 + 2,  # HFMA2 has the tensor pipe's port
        "issue": 9,
        "alu": 2,
        "fma": 2 + 2,
        "xu": 8,
        "shared": 4 * (1 + 4),  # a byte a lane takes a whole cycle of the SM; 512 bytes take 4
    }
    assert on_a100.bound == 8 / 20
    assert on_a10.tensor == 16 and on_a10.fma == 2 + 1 + 2  # two FP32 datapaths; HFMA2 there


def test_without_products_there_is_no_bound():
    assert pipes(main_loop("no_products"), A100).bound == 0.0


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks", "limit"),
    [
        (126, 48 << 10, 8, 2, "registers"),  # 128 x 32 a warp: 4 warps a sub-partition
        (221, 48 << 10, 8, 1, "registers"),  # 224 x 32: 2 warps a sub-partition
        (32, 64 << 10, 4, 2, "smem"),  # 65 KiB with the reserved one; 164 hold two
        (24, 0, 4, 16, "warps"),
        (16, 0, 1, 32, "blocks"),
        (255, 100 << 10, 8, 1, "registers"),
    ],
)
def test_occupancy_of_the_a100(registers, shared, warps, blocks, limit):
    found = occupancy(registers, shared, warps, A100)
    assert (found.blocks, found.warps, found.limit) == (blocks, blocks * warps, limit)


def block(**changes):
    cycles = dict.fromkeys(("tensor", "issue", "alu", "fma", "xu", "shared"), 0.0)
    options = {
        "loop": cycles | {"tensor": 100.0, "alu": 40.0},
        "rest": cycles | {"fma": 500.0},
        "num_warps": 8,
        "resident": 1,
        "reads": 0.0,
        "in_flight": 1e6,
    }
    return Block(**(options | changes))


def test_a_lone_block_pays_for_its_epilogue():
    found = times(block(), A100.sms, 10, 0.0, A100)
    # 8 warps, two on each sub-partition: 2 x (10 passes of 100, then 500)
    assert found.compute == pytest.approx(2 * 1500 / 1.41e9)
    assert found.limit == "compute"


def test_two_blocks_hide_the_epilogue_under_the_loop():
    found = times(block(resident=2), 2 * A100.sms, 10, 0.0, A100)
    assert found.compute == pytest.approx(2 * 2 * 1000 / 1.41e9)  # two blocks' tensor cycles


def test_one_block_more_than_sms_is_another_round():
    one, two = (times(block(), blocks, 10, 0.0, A100).compute for blocks in (108, 109))
    assert two == pytest.approx(2 * one)


def test_dram_time_is_bytes_over_bandwidth_or_what_is_in_flight():
    assert times(block(), 108, 1, 2.03904e9, A100).dram == pytest.approx(1e-3)
    starved = times(block(in_flight=1000.0), 108, 1, 2.03904e9, A100)
    assert starved.dram == pytest.approx(2.03904e9 / (108 * 1000 / DRAM_LATENCY))


def test_l2_time_counts_every_blocks_reads():
    found = times(block(reads=5120.0), 100, 3, 0.0, A100)
    assert found.l2 == pytest.approx(300 / 1.41e9)


def test_an_unknown_gpu_is_named():
    with pytest.raises(ValueError, match="b200.*a100"):
        target("b200")
