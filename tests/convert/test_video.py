"""Latte, STDiT and STDiT3 as their publishers wrote them: the tree, the sizes, the way back."""

import dataclasses
import importlib
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from convert import latte, stdit, stdit3
from convert.__main__ import main
from convert.checkpoint_files import open_checkpoint
from convert.errors import CheckpointError
from convert.export import export_diffusers
from convert.job import plan
from convert.registry import SOURCES
from lowbit_jax.checkpoint import load
from lowbit_jax.models.latte import LATTE_XL_2_UCF101
from lowbit_jax.models.registry import build
from lowbit_jax.models.stdit import STDIT_XL_2_16X256, STDIT_XL_2_16X512, STDIT_XL_2_64X512
from lowbit_jax.models.stdit3 import STDIT3_3B_2, STDIT3_XL_2
from lowbit_jax.quant.recipe import RECIPES
from lowbit_jax.quant.transform import quantize
from tests.references import (
    dit_files,
    flux_files,
    latte_files,
    latte_t2v_files,
    pixart_files,
    stdit3_files,
    stdit_files,
)
from tests.references.conversion import (
    assert_recipes,
    assert_same,
    assert_same_files,
    ported,
    source_shapes,
    write_checkpoint,
)
from tests.references.video_params import latte_params, stdit3_params, stdit_params
from tests.references.video_tables import latte_tables, stdit3_tables, stdit_tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A network in tests."""

    convert: object
    files: object
    tables: object
    params: object  # from a state dict, written apart from `convert`
    published: tuple
    heads: str = "num_heads"  # in config.json

    @property
    def layout(self):
        return self.convert.ORIGINAL

    @property
    def tiny(self):
        return self.files.TINY

    def write(self, folder, config=None, dtype=ml_dtypes.bfloat16, **changes):
        """A random checkpoint in a folder, with the config.json that heads need."""
        config = config or self.tiny
        stated = {self.heads: config.num_heads}
        shapes = self.files.original_shapes(config)
        tables = {name: table.astype(dtype) for name, table in self.tables(config).items()}
        return write_checkpoint(folder, shapes, stated, dtype=dtype, **(tables | changes))


CASES = {
    "latte": Case(
        convert=latte,
        files=latte_files,
        tables=latte_tables,
        params=latte_params,
        published=(LATTE_XL_2_UCF101, dataclasses.replace(LATTE_XL_2_UCF101, num_classes=0)),
        heads="num_attention_heads",
    ),
    "stdit": Case(
        convert=stdit,
        files=stdit_files,
        tables=stdit_tables,
        params=stdit_params,
        published=(STDIT_XL_2_16X256, STDIT_XL_2_16X512, STDIT_XL_2_64X512),
    ),
    "stdit3": Case(
        convert=stdit3,
        files=stdit3_files,
        tables=stdit3_tables,
        params=stdit3_params,
        published=(STDIT3_XL_2,),
    ),
}


@pytest.fixture(params=CASES)
def model(request):
    return request.param


@pytest.fixture
def case(model):
    return CASES[model]


@pytest.fixture
def theirs(model):
    """The torch module of the tests' references, with random weights."""
    pytest.importorskip("torch", reason="the reference is torch")
    reference = importlib.import_module(f"tests.references.{model}")
    size = (CASES[model].tiny.input_size,) if model == "stdit" else ()
    return getattr(reference, f"torch_{model}")(CASES[model].tiny, *size)


def test_a_torch_state_gives_its_tree(tmp_path, model, case, theirs):
    """Of Latte's training checkpoint the moving average; the same tree from safetensors."""
    import torch
    from safetensors.torch import save_file

    state = theirs.state_dict()
    save_file(
        {name: value.contiguous() for name, value in state.items()}, tmp_path / "a.safetensors"
    )
    other = {name: value + 1 for name, value in state.items()}
    torch.save({"model": other, "ema": state} if model == "latte" else state, tmp_path / "b.pt")
    (tmp_path / "config.json").write_text(json.dumps({case.heads: case.tiny.num_heads}))
    expected = case.params({name: value.numpy() for name, value in state.items()}, case.tiny)
    for name in ("a.safetensors", "b.pt"):
        job, params = ported(tmp_path / name)
        assert (job.model, job.layout, job.config) == (model, case.layout, case.tiny)
        assert_same(params, expected)


def test_the_table_names_the_published_tensors_with_their_shapes(model, case):
    """The expected ones are compared with torch modules in tests/models."""
    for config in (*case.published, case.tiny):
        found = source_shapes(model, config, case.layout)
        constants = {c.source: np.shape(c.value(config)) for c in case.layout.constants}
        assert found | constants == case.files.original_shapes(config)
        assert set(constants) == set(case.tables(case.tiny))


def test_no_checkpoint_is_taken_for_another():
    """Each is one of them only, whatever the order they are tried in."""
    names = {
        ("flux", "diffusers"): flux_files.diffusers_shapes(flux_files.TINY),
        ("flux", "Black Forest Labs"): flux_files.bfl_shapes(flux_files.TINY),
        ("dit", "diffusers"): dit_files.diffusers_shapes(dit_files.TINY),
        ("pixart", "diffusers"): pixart_files.diffusers_shapes(pixart_files.TINY),
        ("pixart", "original"): pixart_files.original_shapes(pixart_files.TINY_ORIGINAL),
        ("latte-t2v", "diffusers"): latte_t2v_files.diffusers_shapes(latte_t2v_files.TINY),
    } | {(m, case.layout.name): case.files.original_shapes(case.tiny) for m, case in CASES.items()}
    for expected, tensors in names.items():
        found = [
            (model, layout.name)
            for model, source in SOURCES.items()
            for layout in source.layouts
            if layout.matches(tensors)
        ]
        assert found == [expected]


def test_published_sizes_are_read_from_shapes_and_tables_alone(case):
    for config in case.published:
        shapes, tables = case.files.original_shapes(config), case.tables(config)
        checkpoint = SimpleNamespace(
            source="published",
            config=None,
            names=tuple(shapes),
            info=lambda name, shapes=shapes: SimpleNamespace(shape=shapes[name]),
            read=lambda name, tables=tables: tables[name].astype(np.float16),
        )
        assert case.convert.read_config(checkpoint, case.layout) == config


K = 1152
ATTENTION = {"qkv": (3 * K, K), "proj": (K, K)}
CROSS = {"q_linear": (K, K), "kv_linear": (2 * K, K), "proj": (K, K)}
MLP = {"fc1": (4 * K, K), "fc2": (K, 4 * K)}
EMBEDDERS = {
    "x_embedder/proj": (K, 16),
    "t_embedder/in_layer": (K, 256),
    "t_embedder/out_layer": (K, K),
    "final_layer/linear": (32, K),
}
TEXT = {
    "t_block": (6 * K, K),
    "y_embedder/y_proj/fc1": (K, 4096),
    "y_embedder/y_proj/fc2": (K, K),
}
RATE = {"fps_embedder/in_layer": (K, 256), "fps_embedder/out_layer": (K, K)}


def inside(**parts):
    """{"part/linear": shape}."""
    return {f"{part}/{name}": shape for part, of in parts.items() for name, shape in of.items()}


def in_pairs(block):
    return inside(spatial=block, temporal=block)


LINEARS = {
    "latte": (
        in_pairs(inside(attn=ATTENTION, mlp=MLP) | {"adaLN_modulation": (6 * K, K)}),
        EMBEDDERS | {"final_layer/adaLN_modulation": (2 * K, K)},
    ),
    "stdit": (
        inside(attn=ATTENTION, attn_temp=ATTENTION, cross_attn=CROSS, mlp=MLP),
        EMBEDDERS | TEXT,
    ),
    "stdit3": (
        in_pairs(inside(attn=ATTENTION, cross_attn=CROSS, mlp=MLP)),
        EMBEDDERS | TEXT | RATE,
    ),
}


def test_every_linear_and_what_the_recipes_do_to_it(model, case):
    assert_recipes(model, case.published[0], *LINEARS[model])


@pytest.mark.parametrize("model", ["stdit3"])
def test_quantising_on_the_way_is_quantising_the_ported_tree(tmp_path, case):
    """Of one of them; what differs between the networks is in the tables."""
    source = case.write(tmp_path, dtype=np.float32)
    _, params = ported(source)
    assert_same(ported(source, "w4a8")[1], quantize(params, RECIPES["w4a8"]))


INPUTS = {
    "latte": lambda rng: {
        "x": rng.standard_normal((2, 3, 5, 8, 8), np.float32),
        "labels": np.array([3, 10]),
    },
    "stdit": lambda rng: {
        "x": rng.standard_normal((2, 3, 5, 8, 8), np.float32),
        "caption": rng.standard_normal((2, 7, 24), np.float32),
        "caption_mask": np.ones((2, 7), bool),
    },
    "stdit3": lambda rng: INPUTS["stdit"](rng) | dict.fromkeys(
        ("fps", "height", "width"), np.array([24.0, 64.0], np.float32)
    ),
}  # fmt: skip


def test_a_converted_folder_loads_and_its_w8a8_is_near_the_float_model(
    tmp_path, capsys, model, case
):
    """Random weights of a few blocks: 8 bits leave about 1 % of the output."""
    source, out = case.write(tmp_path / "source", dtype=np.float32), tmp_path / "out"
    assert main([str(source), "--recipe", "w8a8", "--out", str(out), "--dtype", "f32"]) == 0
    assert f"{model} in {case.layout.name} layout" in capsys.readouterr().out
    saved = load(out)
    network = build(saved.model, saved.config)
    assert network.config == case.tiny
    inputs = INPUTS[model](np.random.default_rng(0)) | {"timestep": np.array([10, 700])}
    _, params = ported(source)
    apply = jax.jit(network.apply)
    low, exact = (np.asarray(apply({"params": p}, **inputs)) for p in (saved.params, params))
    assert 0 < np.abs(low - exact).max() < 0.05 * np.abs(exact).max()


def test_an_export_is_the_source_bit_by_bit(tmp_path, model, case):
    source = case.write(tmp_path / "source", max_shard_bytes=100_000)
    job, params = ported(source, dtype=jnp.bfloat16)
    export_diffusers(tmp_path / "export", params, model, job.config)
    assert_same_files(source, tmp_path / "export")
    assert ported(tmp_path / "export")[0].config == case.tiny  # its config.json says what it must


def test_another_table_is_refused(tmp_path, case):
    changes = case.tables(case.tiny)
    for table in changes.values():
        table.reshape(-1)[-1] += 0.01
    source = case.write(tmp_path, dtype=np.float32, **changes)
    with pytest.raises(CheckpointError) as caught:
        ported(source)
    assert len(caught.value.problems) == len(changes)
    assert all(f"tensor '{name}' differs by 0.01" in str(caught.value) for name in changes)


def test_a_table_that_tells_no_scale_is_refused(tmp_path):
    table = stdit_tables(stdit_files.TINY)["pos_embed"]
    for value in (0.0, 0.9, -1e-4, np.nan):
        table[0, 1, 35] = value  # the lowest frequency of a width of 72
        source = CASES["stdit"].write(tmp_path / str(value), dtype=np.float32, pos_embed=table)
        with open_checkpoint(source) as checkpoint:
            with pytest.raises(CheckpointError, match="'pos_embed' has .* where the sine"):
                plan(checkpoint, RECIPES["float"])


def test_what_does_not_fit_is_named_together(tmp_path, model, case):
    last = {"latte": "blocks.3", "stdit": "blocks.2", "stdit3": "temporal_blocks.1"}[model]
    changes = {
        f"{last}.attn.qkv.weight": None,
        f"{last}.attn.qkv.bias": np.zeros(7, np.float32),
        f"{last}.attn.q.weight": np.zeros((8, 8), np.float32),
    }
    with open_checkpoint(case.write(tmp_path, **changes)) as checkpoint:
        with pytest.raises(CheckpointError) as caught:
            plan(checkpoint, RECIPES["float"])
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert f"missing tensor '{last}.attn.qkv.weight'" in text
    assert f"unknown tensor '{last}.attn.q.weight'" in text
    assert f"'{last}.attn.qkv.bias' has shape (7,)" in text


def test_heads_that_nothing_tells_are_asked_for(tmp_path, case):
    source = case.write(tmp_path)
    (source / "config.json").unlink()
    with open_checkpoint(source) as checkpoint:
        with pytest.raises(CheckpointError, match=f'are in no tensor .*"{case.heads}": N'):
            plan(checkpoint, RECIPES["float"])


def test_a_size_that_is_not_square_is_in_the_config(tmp_path):
    config = dataclasses.replace(stdit_files.TINY, input_size=(5, 4, 8))
    source = CASES["stdit"].write(tmp_path / "source", config)
    document = {"num_heads": 2, "input_size": [5, 4, 8]}
    (source / "config.json").write_text(json.dumps(document))
    job, params = ported(source, dtype=jnp.bfloat16)
    assert job.config == config
    export_diffusers(tmp_path / "export", params, "stdit", config)
    assert json.loads((tmp_path / "export" / "config.json").read_text()) == document
    assert_same_files(source, tmp_path / "export")
    for stated, message in (
        ({"input_size": [5, 4]}, r"input_size is .*, not \[frames, rows, columns"),
        ({"input_size": None}, r"'pos_embed' has 8 positions, which is no square; put \"input_si"),
    ):
        (source / "config.json").write_text(json.dumps(document | stated))
        with open_checkpoint(source) as checkpoint:
            with pytest.raises(CheckpointError, match=message):
                plan(checkpoint, RECIPES["float"])


def test_the_published_config_of_stdit3_is_understood(tmp_path):
    """And so is what an export writes: it says no less than Open-Sora's own."""
    tiny = stdit3_files.TINY
    source = CASES["stdit3"].write(tmp_path)
    published = stdit3_files.published_config(tiny)
    (source / "config.json").write_text(json.dumps(published))
    assert ported(source)[0].config == tiny
    written = stdit3.to_config(tiny)
    assert {name: published[name] for name in written} == json.loads(json.dumps(written))
    for config in (STDIT3_XL_2, STDIT3_3B_2):
        assert stdit3.to_config(config)["num_heads"] == config.num_heads
    for field, value in (("mlp_ratio", 2.0), ("skip_y_embedder", True)):
        (source / "config.json").write_text(json.dumps(published | {field: value}))
        with open_checkpoint(source) as checkpoint:
            with pytest.raises(CheckpointError, match=f"{field} is .*; STDiT3 has"):
                plan(checkpoint, RECIPES["float"])
