"""The GPU programs as far as a CPU shows them: refusals, arithmetic, lowering, failures found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import device_timing, gpu_check, gpu_matmul
from pallas_kernels import api
from pallas_kernels.audit.cases import OPS
from pallas_kernels.audit.targets import TARGETS

SMALL = {"int4_a8_group128_zero": (20, 300, 24), "modulate_quantize_rows_rotated": (6, 256, 0)}


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
@pytest.mark.parametrize("program", [gpu_check, gpu_matmul])
def test_without_a_gpu_it_says_so(program, capsys):
    assert program.main([]) == 2
    captured = capsys.readouterr()
    assert "needs an NVIDIA GPU" in captured.err and "figure" not in captured.out


@pytest.mark.parametrize("op", OPS)
def test_the_check_passes_what_is_right(op):
    """The plain form, which on a CPU is not what the program is for, but runs everywhere."""
    outcome = gpu_check.check(op, *SMALL.get(op, (20, 256, 24)), implementation="xla")
    assert outcome.fault is None


def test_the_check_passes_a_kernel_in_interpret_mode():
    assert (
        gpu_check.check("ternary_a8_gated", 17, 130, 20, implementation="interpret").fault is None
    )


@pytest.mark.parametrize("op", ["int8_a8", "ternary_a16", "int4_a8_group128_zero"])
def test_the_check_finds_one_wrong_product(op, monkeypatch):
    """One code of the last row and channel is off by one; a NaN; a wrong shape; an exception."""
    right = api.matmul

    def last(change):
        def wrong(*args, **kwargs):
            out = right(*args, **kwargs)
            return out.at[-1, -1].set(change(out[-1, -1]))

        return wrong

    def fault(matmul):
        monkeypatch.setattr(api, "matmul", matmul)
        return gpu_check.check(op, *SMALL.get(op, (20, 256, 24)), implementation="xla").fault

    assert "1 of" in fault(last(lambda y: y + 0.02))
    assert "nan" in fault(last(lambda y: y * jnp.nan))
    assert "was asked for" in fault(lambda *a, **k: right(*a, **k)[1:])
    refused = "NotImplementedError: the backend cannot"
    assert refused in fault(
        lambda *a, **k: (_ for _ in ()).throw(NotImplementedError(refused[21:]))
    )


def test_the_check_finds_a_wrong_row(monkeypatch):
    right = api.quantize_rows

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        return out._replace(codes=out.codes.at[-1, -1].add(3))

    monkeypatch.setattr(api, "quantize_rows", wrong)
    assert gpu_check.check("quantize_rows", 9, 128, 0, implementation="xla").fault


def test_every_op_is_checked_at_every_shape():
    quick, full = (list(gpu_check.cases(quick)) for quick in (True, False))
    assert {op for op, _ in quick} == {op for op, _ in full} == set(OPS)
    assert len(set(full)) == len(full) > 500
    assert ("ternary_a8", (4608, 3072, 21504)) in full and ("quantize_rows", (1, 3072, 0)) in full


def test_a_failure_is_told_and_ends_with_1(monkeypatch, capsys):
    device = type("Device", (), {"device_kind": "GPU", "compute_capability": "8.0"})()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    faults = {"int8_a8": "3 of 9 sampled values are wrong"}
    made_up = lambda op, m, k, n: gpu_check.Outcome(op=op, shape=(m, k, n), fault=faults.get(op))  # noqa: E731
    monkeypatch.setattr(gpu_check, "check", made_up)
    assert gpu_check.main(["--quick"]) == 1
    out = capsys.readouterr().out
    assert "int8_a8 (1, 3072, 9216): 3 of 9" in out and "failed=8" in out.splitlines()[-1]
    faults.clear()
    assert gpu_check.main(["--quick"]) == 0


def test_dispatch_is_no_part_of_a_call(monkeypatch):
    """A clock that charges 7 s for every start and 0.25 s for every call."""
    now = [0.0]
    monkeypatch.setattr(device_timing.time, "perf_counter", lambda: now[0])

    def run(n):
        now[0] += 7 + 0.25 * n

    assert device_timing.seconds_per_call(run) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="the timing is disturbed"):
        device_timing.seconds_per_call(lambda n: None)


def test_a_loop_runs_its_step_n_times_in_a_chain():
    run = device_timing.looped(lambda x, c: x * 2 + c, jnp.float32(1), jnp.float32(1))
    assert [float(run(n)) for n in (0, 1, 5)] == [1, 3, 63]


@pytest.mark.parametrize("form", gpu_matmul.FORMS)
def test_a_form_s_next_call_waits_for_its_last(form):
    """The chain changes one element of the activations, and bounds it."""
    w = gpu_matmul.operands(form, 4, 256, 24, cache=10_000)
    step = gpu_matmul.bf16_step if form == gpu_matmul.BF16 else gpu_matmul.quantized_step(form)
    assert 1 < len(w.copies) <= gpu_matmul.MOST_COPIES
    run = device_timing.looped(step, w.x, w.copies, w.scale, w.bias)
    first, second = (jax.tree.leaves(run(n)) for n in (0, 9))
    pairs = [tuple(map(np.asarray, pair)) for pair in zip(first, second, strict=True)]
    changed = [(a[a != b], b[a != b]) for a, b in pairs if (a != b).any()]
    assert len(changed) == 1 and changed[0][1].size == 1 and 0.005 < changed[0][1][0] <= 1
    assert len(gpu_matmul.operands(form, 256, 256, 24, cache=10**6).copies) == 1


def test_our_forms_are_kernels_where_they_are_lowered_for_cuda(lower_for_cuda):
    for form in gpu_matmul.FORMS:
        w = gpu_matmul.operands(form, 256, 256, 128, cache=0)
        step = gpu_matmul.bf16_step if form == gpu_matmul.BF16 else gpu_matmul.quantized_step(form)
        chain = jax.jit(lambda x, *rest, step=step: step(x, *rest))
        if form in gpu_matmul.OURS:
            lower_for_cuda(chain, w.x, w.copies, w.scale, w.bias)  # a kernel is in it
            continue
        traced = chain.trace(w.x, w.copies, w.scale, w.bias)
        assert "triton" not in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_roofline_by_hand():
    """A100: 312 TFLOP/s in bfloat16, 624 TOP/s in int8, 2.039 TB/s."""
    a100 = TARGETS["a100"]
    flops = 2 * 4608 * 3072 * 12288
    assert gpu_matmul.roofline("XLA bf16", *gpu_matmul.MAIN, a100) == pytest.approx(
        flops / 312e12, rel=0.01
    )
    assert gpu_matmul.roofline("ternary A8", *gpu_matmul.MAIN, a100) == pytest.approx(
        flops / 624e12, rel=0.01
    )
    weights = 3072 * 9216 / 4
    moved = weights + 3072 + 2 * 9216
    assert gpu_matmul.roofline("ternary A8", 1, 3072, 9216, a100) == pytest.approx(
        moved / 2.03904e12
    )


def test_gpus_are_known_by_their_names():
    assert gpu_matmul.describe("NVIDIA A100-SXM4-80GB") is TARGETS["a100"]
    assert gpu_matmul.describe("NVIDIA A10") is TARGETS["a10"]
    assert gpu_matmul.describe("NVIDIA H100 80GB HBM3") is TARGETS["h100"]
    assert gpu_matmul.describe("Tesla T4") is None
    times = {form: 2.0 if form == gpu_matmul.BF16 else 1.0 for form in gpu_matmul.FORMS}
    assert "ternary_a8_speedup=2.000" in gpu_matmul.figure(times)
    shown = gpu_matmul.table({gpu_matmul.MAIN: times}, None)
    assert shown.row_count == 1
