"""The SASS reader, on pieces cut from what nvdisasm printed of real kernels."""

from pathlib import Path

import pytest

from pallas_kernels.audit import sass

FIXTURES = Path(__file__).parent / "fixtures"


def function(name):
    (found,) = sass.parse((FIXTURES / f"{name}.sass").read_text(encoding="utf-8")).values()
    return found


def instruction(opcode, predicate=""):
    return sass.Instruction(0, predicate, opcode, "")


def opcodes_between(name, first, last):
    """The opcodes of a fixture from one line to another, read by no code of ours."""
    text = (FIXTURES / f"{name}.sass").read_text(encoding="utf-8")
    lines = text[text.index(first) : text.index(last) + len(last)].splitlines()
    words = [line.split("*/")[1].split() for line in lines if "/*" in line]
    return [w[1] if w[0].startswith("@") else w[0] for w in words]


def test_main_loop_of_an_integer_product():
    found = function("int8_128x128x64")
    assert found.name == "int8_matmul" and found.main.is_loop
    expected = opcodes_between("int8_128x128x64", ".L_x_0:", "@P0 BRA `(.L_x_0) ;")
    assert [i.opcode for i in found.main.instructions] == expected
    assert found.main.mma == {"IMMA.16832.S8.S8": 32}
    assert found.main.roots["LDSM"] == 12 and found.main.roots["LDGSTS"] == 4
    assert found.main.byte_loads == 0
    assert found.main.shared_by_width == {"LDSM.16": 12}
    # a block of 8 warps copies (128 + 128) x 64 bytes a pass
    assert 8 * found.main.global_read_bytes == (128 + 128) * 64


def test_byte_wide_shared_loads_are_seen():
    main = function("byte_loads").main
    text = (FIXTURES / "byte_loads.sass").read_text(encoding="utf-8")
    loop = text[text.index(".L_x_0:") : text.index("BRA `(.L_x_0)")]
    assert main.byte_loads == loop.count("LDS.U8") + loop.count("LDS.S8") > 0
    assert main.mma == {"IMMA.16832.S8.S8": 2}


def test_a_loop_without_products():
    main = function("no_products").main
    assert main.is_loop and main.mma == {} and main.byte_loads == 0
    assert main.instructions[-1].root == "BRA"


def test_an_unrolled_loop_is_what_lies_between_the_products():
    main = function("unrolled").main
    assert not main.is_loop
    assert main.instructions[0].root == main.instructions[-1].root == "IMMA"
    assert sum(main.mma.values()) == 64


def test_the_self_jump_behind_the_exit_is_no_loop():
    assert len(function("int8_128x128x64").loops) == 1


def test_padding_that_never_executes_moves_nothing():
    live, padding = instruction("LDS"), instruction("LDS", "@!PT")
    region = sass.Region([live, padding])
    assert region.shared_by_width == {"LDS.4": 1} and len(region) == 2


@pytest.mark.parametrize(
    ("opcode", "macs"),
    [
        ("IMMA.16832.S8.S8.SAT", 16 * 8 * 32),
        ("IMMA.16816.S8.S8", 16 * 8 * 16),
        ("HMMA.16816.F32.BF16", 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 16 * 8 * 8),
        ("DMMA.884", 8 * 8 * 4),
        ("IGMMA.64x128x32.S8.S8", 64 * 128 * 32 // 4),
        ("HGMMA.64x256x16.F32.BF16", 64 * 256 * 16 // 4),
    ],
)
def test_macs_of_a_matrix_instruction(opcode, macs):
    assert instruction(opcode).macs == macs


def test_an_unknown_shape_is_not_passed_over():
    with pytest.raises(ValueError, match="IMMA.NEW"):
        _ = instruction("IMMA.NEW").macs


@pytest.mark.parametrize(
    ("opcode", "pipe"),
    [
        ("LOP3.LUT", "alu"),
        ("PRMT", "alu"),
        ("IADD3.X", "alu"),
        ("FSETP.GT.AND", "alu"),
        ("IMAD.MOV.U32", "fma_integer"),
        ("FFMA", "fma_float"),
        ("I2F.S8", "xu"),
        ("F2I.S8.NTZ", "xu"),
        ("MUFU.EX2", "xu"),
        ("HFMA2.BF16_V2", "half"),
        ("IMMA.16832.S8.S8", "tensor"),
        ("LDSM.16.M88.4", ""),
        ("UIADD3", ""),
        ("BAR.SYNC.DEFER_BLOCKING", ""),
        ("NEVERSEEN", "alu"),  # not free
    ],
)
def test_pipe(opcode, pipe):
    assert instruction(opcode).pipe == pipe


@pytest.mark.parametrize(
    ("opcode", "size"),
    [
        ("LDS.U8", 1),
        ("LDS.S8", 1),
        ("LDS.U16", 2),
        ("LDS", 4),
        ("LDS.64", 8),
        ("STS.128", 16),
        ("LDG.E.U8.CONSTANT", 1),
        ("LDGSTS.E.BYPASS.128", 16),
        ("LDGSTS.E", 4),
        ("LDSM.16.M88.4", 16),
        ("LDSM.16.MT88.2", 8),
        ("LDSM.16.M88", 4),
    ],
)
def test_bytes_a_lane(opcode, size):
    assert instruction(opcode).lane_bytes == size


def test_text_that_is_no_disassembly_is_refused():
    with pytest.raises(ValueError, match="nvdisasm"):
        sass.parse("ptxas info : nothing here")
