"""The strict reader and the streaming writer, against the real `safetensors` package."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from convert.errors import CheckpointError
from convert.safetensors import TensorFile, TensorSpec, write_safetensors, write_sharded
from convert.safetensors_header import DTYPES

SHAPES = [(), (0,), (3,), (2, 5), (0, 4), (1, 2, 3, 4)]


def every_dtype() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {}
    for code, dtype in DTYPES.items():
        for shape in SHAPES:
            raw = rng.integers(0, 2 if code == "BOOL" else 120, shape)
            tensors[f"{code.lower()}.{'x'.join(map(str, shape)) or 'scalar'}"] = raw.astype(dtype)
    return tensors


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def test_reads_what_the_package_writes(tmp_path: Path):
    tensors = every_dtype()
    path = tmp_path / "a.safetensors"
    plain = {name: x for name, x in tensors.items() if x.dtype.kind in "biuf"}
    safetensors.numpy.save_file(plain, path, {"format": "np"})
    with TensorFile(path) as file:
        assert file.names == tuple(sorted(plain)) and file.metadata == {"format": "np"}
        for name, x in plain.items():
            info, got = file.info(name), file.read(name)
            assert (info.dtype, info.shape, info.nbytes) == (x.dtype, x.shape, x.nbytes)
            assert info.path == path and same(got, x) and not got.flags.writeable
            assert got.size == 0 or not got.flags.owndata  # a view


def test_bf16_and_f8_agree_with_torch_both_ways(tmp_path: Path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    kinds = {
        torch.bfloat16: ml_dtypes.bfloat16,
        torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
        torch.float8_e5m2: ml_dtypes.float8_e5m2,
    }
    wanted = {str(kind): torch.linspace(-3, 3, 24).reshape(4, 6).to(kind) for kind in kinds}
    wanted |= {"scalar": torch.tensor(1.5, dtype=torch.bfloat16), "f32": torch.ones(3)}
    path, back = tmp_path / "torch.safetensors", tmp_path / "ours.safetensors"
    save_file(wanted, path)
    with TensorFile(path) as file:
        for name, x in wanted.items():
            got = file.read(name)
            assert got.dtype == kinds.get(x.dtype, np.float32) and got.shape == tuple(x.shape)
            np.testing.assert_array_equal(got.astype(np.float32), x.float().numpy())
        write_safetensors(back, {name: file.read(name) for name in file.names}, {"format": "pt"})
    again = load_file(back)
    assert all(torch.equal(again[n].float(), x.float()) for n, x in wanted.items())
    assert all(again[n].dtype == x.dtype for n, x in wanted.items())


def test_the_package_reads_what_we_write(tmp_path: Path):
    tensors = every_dtype()
    path = write_safetensors(tmp_path / "a.safetensors", tensors, {"k": "ü"})
    raw = path.read_bytes()
    assert (8 + int.from_bytes(raw[:8], "little")) % 8 == 0
    found = dict(safetensors.deserialize(raw))
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        assert DTYPES[found[name]["dtype"]] == x.dtype
        assert tuple(found[name]["shape"]) == x.shape and found[name]["data"] == x.tobytes()
    with TensorFile(path) as file:
        assert file.metadata == {"k": "ü"}
        assert all(same(file.read(name), x) for name, x in tensors.items())
        # aligned, so that no read is a copy
        assert all(file.info(n).offset % x.dtype.itemsize == 0 for n, x in tensors.items())


def test_same_bytes_as_the_package(tmp_path: Path):
    plain = {name: x for name, x in every_dtype().items() if x.dtype.kind in "biuf"}
    backwards = dict(reversed(plain.items()))
    path = write_safetensors(tmp_path / "a.safetensors", backwards)
    assert path.read_bytes() == safetensors.numpy.save(plain)


def test_odd_addresses_bool_bytes_names_and_closing(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    table = {
        "a": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "BF16", "shape": [2], "data_offsets": [1, 5]},
    }
    values = np.array([1.5, -2], ml_dtypes.bfloat16)
    for pad in (b"", b" "):  # one of the two puts b at an odd address
        header = json.dumps(table).encode() + pad
        data = b"\x02" + values.tobytes()
        path.write_bytes(len(header).to_bytes(8, "little") + header + data)
        with TensorFile(path) as file:
            assert same(file.read("b"), values) and file.read("b").flags.aligned
            with pytest.raises(CheckpointError, match="'a': BOOL holds the byte 2"):
                file.read("a")
            with pytest.raises(CheckpointError, match="no tensor 'bb' among its 2; did you mean"):
                file.info("bb")
            kept = file.read("b")
        file.close()
        assert same(kept, values)
        with pytest.raises(ValueError, match="closed"):
            file.read("b")
    with pytest.raises(CheckpointError, match="does not exist"):
        TensorFile(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="not a regular file"):
        TensorFile(tmp_path)


def test_writer_is_atomic_and_polite(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    ones = np.ones(4, np.float32)
    write_safetensors(path, {"a": ones})
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="exists already; pass overwrite=True"):
        write_safetensors(path, {"a": ones * 2})

    def breaks() -> np.ndarray:
        raise KeyboardInterrupt

    wrong = "'b': promised float32.4., made float32.3."
    cases = ((breaks, KeyboardInterrupt, None), (lambda: ones[:3], CheckpointError, wrong))
    for make, error, message in cases:
        with pytest.raises(error, match=message):
            specs = {"a": ones, "b": TensorSpec(shape=(4,), dtype=np.float32, make=make)}
            write_safetensors(path, specs, overwrite=True)
        assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]
    write_safetensors(path, {"a": ones[::2] * 2}, overwrite=True)
    with TensorFile(path) as file:
        assert same(file.read("a"), np.full(2, 2, np.float32))
        assert file.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(CheckpointError) as caught:
        write_safetensors(tmp_path / "b", {"": ones, "c": np.ones(1, complex), "l": [1.0]})
    assert len(caught.value.problems) == 3
    with pytest.raises(CheckpointError, match="make it first"):
        write_safetensors(tmp_path / "no" / "b", {"a": ones})
    with pytest.raises(ValueError, match="at least 1, it is 0"):
        write_sharded(tmp_path, {"a": ones}, 0)


RSS = """
import sys, numpy as np
from convert.safetensors import TensorFile, TensorSpec, write_safetensors
def kib(key):
    return int(open("/proc/self/status").read().split(key + ":")[1].split()[0])
path, shape = sys.argv[1], (2, 2**20)
make = lambda: np.ones(shape, np.float32)
specs = {f"t{i:02}": TensorSpec(shape=shape, dtype=np.float32, make=make) for i in range(32)}
start = kib("VmRSS")
write_safetensors(path, specs)
with TensorFile(path) as file:
    for name in file.names:
        assert file.read(name)[:, ::512].sum() == 4096
        file.release(name)
    file.sha256()
    print((kib("VmHWM") - start) // 1024)
    for name in file.names:
        file.read(name)[:, ::512].sum()
    print((kib("VmHWM") - start) // 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_streaming_256_mib_stays_small(tmp_path: Path):
    path = tmp_path / "big.safetensors"
    root = Path(__file__).parents[2]
    out = subprocess.run(
        [sys.executable, "-c", RSS, str(path)], cwd=root, check=True, capture_output=True, text=True
    ).stdout.split()
    path.unlink()
    with_release, without = map(int, out)
    # 8 MiB tensors: one being written or read, with room for the interpreter; then the whole file
    assert with_release < 48 and without > 240
