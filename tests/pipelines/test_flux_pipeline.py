"""From a prompt to pixels: the converted pipeline against diffusers' own on the same folder."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.__main__ import main as convert
from convert.port import port
from convert.statistics import save_statistics
from lowbit_jax.calibration.ranges import TimestepRanges
from lowbit_jax.checkpoint import OutputError, abstract_parts, load, read_manifest
from lowbit_jax.cli import main
from lowbit_jax.models.registry import build
from lowbit_jax.pipelines import FluxPipeline, flux_pipeline
from lowbit_jax.pipelines.flux import sample_tokens
from lowbit_jax.pipelines.flux_programs import decoded
from lowbit_jax.pipelines.folder import PipelineError
from lowbit_jax.pipelines.picture import to_bytes
from lowbit_jax.quant import Balance, Recipe, Rule, WeightSpec
from lowbit_jax.quant.ranged import has_ranges
from lowbit_jax.quant.report import size_report
from tests.references.calibration import random_statistics

pytest.importorskip("diffusers", reason="the reference is diffusers")
pytest.importorskip("transformers", reason="the reference is diffusers")
from tests.references import pipelines as reference  # noqa: E402

PROMPTS = ["The cat and the fox, in the SNOW", "a red ox at " + "the cat and " * 9]
RANGES = Balance(alpha=(0.3, 0.6))
SIZE = {"height": 12, "width": 20}
MAX_LENGTH = 24


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """kind -> diffusers' folder, made when first asked for."""
    made = {}

    def source(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind) / "source"
            made[kind] = reference.write_pipeline(folder, dev=kind == "dev")
        return made[kind]

    return source


@pytest.fixture(scope="module")
def converted(sources, tmp_path_factory):
    """(kind, options of convert_and_quantize) -> converted folder."""
    made = {}

    def make(kind, *options):
        if (kind, options) not in made:
            out = tmp_path_factory.mktemp("converted") / kind
            arguments = [str(sources(kind)), "--out", str(out), *options]
            assert convert([*arguments, "--dtype", "f32"]) == 0
            made[kind, options] = out
        return made[kind, options]

    return make


FLOAT = ("--recipe", "float")


def live_bytes():
    return sum(array.nbytes for array in jax.live_arrays())


def modulation_bytes(pipeline):
    """Of the parameters that modulations alone are made of: embedders, and "mod" in their names."""
    names = "time_in", "guidance_in", "vector_in", "_mod/", "modulation", "adaLN"
    return sum(
        leaf.size * leaf.dtype.itemsize
        for _, part in abstract_parts(manifests(pipeline)["transformer"])
        for path, leaf in part.items()
        if any(name in path for name in names)
    )


def manifests(pipeline):
    return {part: read_manifest(pipeline.folder / part) for part in pipeline.configs}


@pytest.mark.filterwarnings("ignore:.*does not see")
@pytest.mark.parametrize("kind", ["dev", "schnell"])
def test_pictures_equal_those_of_diffusers(sources, converted, kind, monkeypatch):
    """Float32; bytes differ by rounding alone, a half here and there. Resident and sequential are
    equal to the bit, and a picture does not depend on what else is made."""
    noise = np.random.default_rng(0).standard_normal((2, 15, 16), np.float32)
    guidance = {"guidance": 3.5} if kind == "dev" else {}
    expected = reference.run_pipeline(
        sources(kind), PROMPTS, noise, steps=3, guidance=3.5, max_length=MAX_LENGTH, **SIZE
    )
    assert expected.std() > 0.1 and ((expected > 0) & (expected < 1)).mean() > 0.5
    options = {"steps": 3, "max_length": MAX_LENGTH, "noise": noise, **guidance, **SIZE}
    pipeline = FluxPipeline(converted(kind, *FLOAT))
    found = [picture.pixels for picture in pipeline(PROMPTS, **options)]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == (12, 20, 3)
        assert np.abs(ours - 255 * theirs).max() < 0.5 + 255 * 1e-4
    lean = FluxPipeline(converted(kind, *FLOAT), sequential=True)
    held = {}
    before = live_bytes()
    watch = lambda stage, done, total: held.update({stage: live_bytes() - before})  # noqa: E731
    for ours, again in zip(found, lean(PROMPTS, progress=watch, **options), strict=True):
        np.testing.assert_array_equal(ours, again.pixels)
    # at the end of each stage: its own part, and what goes from stage to stage
    parts = {part: size_report(abstract_parts(m)).after for part, m in manifests(lean).items()}
    once = modulation_bytes(lean)
    assert once > 0.2 * parts["transformer"]
    parts["transformer"] -= once
    for stage in parts:
        assert parts[stage] <= held[stage] < parts[stage] + 50_000 < sum(parts.values()) / 1.4
    assert once <= held["loading modulation"] < once + 50_000
    assert live_bytes() - before < 50_000
    monkeypatch.setattr(flux_pipeline, "HELD", 1)  # the transformer anew for every picture
    for ours, again in zip(found, lean(PROMPTS, **options), strict=True):
        np.testing.assert_array_equal(ours, again.pixels)
    alone = pipeline(PROMPTS[1], **options | {"noise": noise[1:]})
    np.testing.assert_array_equal(alone[0].pixels, found[1])


@pytest.mark.slow
def test_quantised_parts_in_any_mix(converted):
    """By the program: ternary transformer, T5 in int8; another picture than the float one."""
    recipe = "flux-1.58bit"
    options = ("--recipe", recipe, "--text-recipe", "w8a16")
    low = FluxPipeline(converted("dev", *options))
    assert low.recipes == {
        "text_encoder": "float",
        "text_encoder_2": "w8a16",
        "transformer": recipe,
        "vae": "float",
    }
    call = {"steps": 3, "max_length": MAX_LENGTH, "seed": 3, **SIZE}
    (found,), (exact,) = (
        low("a cat", **call),
        FluxPipeline(converted("dev", *FLOAT))("a cat", **call),
    )
    error = np.abs(found.pixels.astype(float) - exact.pixels).mean()
    assert 0 < error < 80
    assert found.settings["recipe of transformer"] == recipe


@pytest.mark.slow
def test_kernels_of_timestep_ranges(sources, tmp_path):
    """Modulations included: pictures as of a loop that asks the whole model in every step."""
    source = sources("dev")
    transformer = port(source / "transformer", dtype=jnp.float32)
    edges = TimestepRanges((0, 0.6, 1))
    statistics = random_statistics(
        transformer.params, config=json.dumps(transformer.config), ranges=edges, model="flux"
    )
    stats = save_statistics(tmp_path / "statistics.safetensors", statistics)
    rules = (
        Rule(
            match=r".*blocks/.*",
            weights=WeightSpec(format="int8", quantizer="absmax"),
            balance=RANGES,
        ),
    )
    recipe = tmp_path / "ranged.json"
    recipe.write_text(json.dumps(Recipe(name="ranged", rules=rules).to_json()))
    out = tmp_path / "out"
    assert run(source, "--recipe", recipe, "--stats", stats, "--dtype", "f32", "--out", out) == 0
    noise = np.random.default_rng(0).standard_normal((1, 15, 16), np.float32)
    options = {"steps": 4, "max_length": MAX_LENGTH, "noise": noise, "guidance": 3.5, **SIZE}
    pipeline = FluxPipeline(out)
    (found,) = pipeline("a cat", **options)
    (lean,) = FluxPipeline(out, sequential=True)("a cat", **options)
    np.testing.assert_array_equal(found.pixels, lean.pixels)
    saved = load(out / "transformer")
    assert has_ranges(saved.params["double_blocks"]["0"]["img_mod"])
    (texts,) = pipeline.encode(["a cat"], MAX_LENGTH)
    expected = sample_tokens(
        build(saved.model, saved.config, jnp.float32),
        saved.params,
        noise,
        texts.states,
        texts.pooled,
        pipeline._schedule.sigmas(4, 15),
        grid=(3, 5),
        guidance=jnp.full(1, 3.5),
    )
    part = pipeline._parts["vae"]
    pixels = to_bytes(np.asarray(decoded(part.model, part.params, expected, grid=(3, 5)))[0])
    assert np.abs(found.pixels.astype(int) - pixels).max() <= 1


def test_pictures_come_as_soon_as_they_are_there(converted):
    """So that a batch that is cut off leaves those that were finished."""
    pipeline, stages = FluxPipeline(converted("dev", *FLOAT)), []
    note = lambda stage, done, total: stages.append((stage, done, total))  # noqa: E731
    stream = pipeline.stream(
        ["a cat", "a fox"], steps=3, max_length=MAX_LENGTH, progress=note, **SIZE
    )
    assert next(stream).settings["seed"] == "0"
    assert stages[-2:] == [("loading vae", 1, 1), ("vae", 1, 2)]
    assert [s for s in stages if s[0] == "transformer"] == [
        ("transformer", i, 6) for i in (1, 2, 3)
    ]
    assert next(stream).settings["seed"] == "1" and stages[-1] == ("vae", 2, 2)
    assert not list(stream)


def test_inspect_shows_every_part(converted, capsys):
    assert main(["inspect", str(converted("dev", *FLOAT)), "--verify"]) == 0
    said = " ".join(capsys.readouterr().out.split())  # a console of 80 columns breaks lines
    assert said.count("every tensor matches its digest") == 4
    assert all(f": {model}, recipe 'float'" in said for model in ("t5", "flux", "autoencoder-kl"))


def test_text_states_are_kept(converted, monkeypatch):
    """A prompt is encoded once, whatever else is asked for; what is cut off is told."""
    told = []
    pipeline = FluxPipeline(converted("dev", *FLOAT), report=told.append)
    first = pipeline.encode(["a cat", "a cat", PROMPTS[1]], MAX_LENGTH)
    assert first[0] is first[1]
    assert len(told) == 2 and told[0].startswith("CLIP takes 21 tokens; of 'a red ox at the cat")
    assert told[1].startswith("T5 takes 24 tokens") and told[1].endswith("cat and'")
    monkeypatch.setattr(pipeline, "_load", None)
    assert pipeline.encode(["a cat"], MAX_LENGTH)[0] is first[0]


def test_the_program_writes_pictures_that_say_how_they_were_made(converted, tmp_path, capsys):
    from PIL import Image

    folder, out = converted("schnell", *FLOAT), tmp_path / "x.png"
    size = ["--height", "12", "--width", "20", "--max-length", "24"]
    arguments = ["sample", str(folder), "--prompt", "der Fuchs, 狐", "--seed", "5", *size]
    assert main([*arguments, "--out", str(out)]) == 0
    assert (
        "1 picture(s), 20 x 12, 4 steps, guidance none, recipe 'float'" in capsys.readouterr().out
    )
    picture = Image.open(out)
    assert picture.size == (20, 12)
    wanted = {
        "prompt": "der Fuchs, 狐",
        "seed": "5",
        "steps": "4",
        "recipe of transformer": "float",
    }
    assert wanted.items() <= picture.text.items()
    assert picture.text["model"] == "FLUX.1 schnell"
    before = out.read_bytes()
    assert main([*arguments, "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert out.read_bytes() == before and list(tmp_path.iterdir()) == [out]
    # the same seed and prompt as one of a batch: the same pixels
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\n der Fuchs, 狐\n", encoding="utf-8")
    batch = ["sample", str(folder), "--batch", str(prompts), "--seed", "4", *size]
    assert main([*batch, "--out", str(tmp_path / "many"), "--sequential"]) == 0
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == ["0000.png", "0001.png"]
    again = Image.open(tmp_path / "many" / "0001.png")
    np.testing.assert_array_equal(np.asarray(again), np.asarray(picture))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": 3.0}, "this model (schnell) takes none"),
        ({"height": 11}, "both must be multiples of 4, such as 12 x 20"),
        ({"steps": 0}, "steps is 0, it must be at least 1"),
        ({"noise": np.zeros((1, 4, 16))}, "these pictures need (1, 15, 16)"),
    ],
)
def test_options_that_cannot_be_done_are_refused(converted, options, message):
    pipeline = FluxPipeline(converted("schnell", *FLOAT))
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        pipeline("a cat", **SIZE | options)


def test_the_program_refuses_bad_arguments(converted, tmp_path, capsys):
    folder = converted("schnell", *FLOAT)

    def refused(*arguments):
        assert main(["sample", str(folder), *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "give either --prompt TEXT or --batch FILE" in refused("--out", tmp_path / "x.png")
    assert "give a name that ends in .png" in refused("--prompt", "a", "--out", tmp_path / "x.jpg")
    assert "there is no folder" in refused("--prompt", "a", "--out", tmp_path / "no" / "x.png")
    (tmp_path / "empty.txt").write_text("\n")
    assert "holds no prompt" in refused("--batch", tmp_path / "empty.txt", "--out", tmp_path)
    assert not (tmp_path / "x.png").exists()


def test_a_folder_that_is_no_whole_pipeline_is_refused(converted, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(converted("schnell", *FLOAT), folder)
    (folder / "vae").rename(tmp_path / "vae")
    with pytest.raises(PipelineError, match="part 'vae' .autoencoder-kl. is missing"):
        FluxPipeline(folder)
    shutil.copytree(folder / "text_encoder", folder / "vae")
    with pytest.raises(PipelineError, match="vae: holds clip-text, not autoencoder-kl"):
        FluxPipeline(folder)
    shutil.rmtree(folder / "vae")
    (tmp_path / "vae").rename(folder / "vae")
    (folder / "tokenizer").rename(folder / "other")
    (folder / "tokenizer_2").rename(folder / "tokenizer")
    (folder / "other").rename(folder / "tokenizer_2")
    with pytest.raises(
        PipelineError, match="part 'tokenizer_2' is missing, or lacks tokenizer.json"
    ):
        FluxPipeline(folder)
    shutil.copy(folder / "tokenizer" / "tokenizer.json", folder / "tokenizer_2")
    with pytest.raises(PipelineError, match="tokenizer: not the tokeniser of this CLIP text"):
        FluxPipeline(folder)
    (folder / "pipeline.json").unlink()
    with pytest.raises(PipelineError, match="no pipeline.json, so no converted pipeline"):
        FluxPipeline(folder)


def run(*arguments):
    return convert([str(argument) for argument in arguments])


def test_a_source_that_lacks_parts_is_refused_with_all_their_names(sources, tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(sources("dev"), source)
    shutil.rmtree(source / "text_encoder_2")
    (source / "tokenizer" / "merges.txt").unlink()
    assert run(source, *FLOAT, "--out", out) == 2
    said = capsys.readouterr().err
    assert "part 'text_encoder_2' (t5) is missing" in said
    assert (
        "part 'tokenizer' is missing, or lacks vocab.json and merges.txt or tokenizer.json" in said
    )
    assert f"for the transformer alone give {source / 'transformer'}" in said
    assert list(tmp_path.iterdir()) == [source]
    assert run(source / "transformer", *FLOAT, "--out", out) == 0


def test_parts_that_do_not_fit_are_refused_before_anything_is_written(sources, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(sources("dev"), source)
    shutil.copytree(sources("schnell") / "transformer", source / "schnell")
    scheduler = source / "scheduler" / "scheduler_config.json"
    document = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps(document | {"_class_name": "DDIMScheduler"}))
    assert run(source, *FLOAT, "--out", tmp_path / "out") == 2
    assert "scheduler/scheduler_config.json" in capsys.readouterr().err
    scheduler.write_text(json.dumps(document))
    vocabulary = source / "tokenizer" / "vocab.json"
    tokens = json.loads(vocabulary.read_text())
    vocabulary.write_text(json.dumps(tokens | {"dog</w>": len(tokens)}))
    assert run(source, *FLOAT, "--out", tmp_path / "out") == 2
    assert (
        "not the tokeniser of this CLIP text encoder: it has 521 tokens" in capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == [source]
    assert run(source / "transformer", *FLOAT, "--text-recipe", "w8a16", "--dry-run") == 2
    assert "--text-recipe is for whole pipelines" in capsys.readouterr().err


def test_an_interrupted_conversion_goes_on_and_ends_the_same(
    sources, converted, tmp_path, monkeypatch, capsys
):
    """The disk fills up while the autoencoder is written: what is there is kept, then taken."""
    from lowbit_jax import checkpoint_writer

    out, save = tmp_path / "out", checkpoint_writer.save_arrays

    def full(path, arrays):
        if "vae" in str(path):
            raise OutputError("No space left on device")
        save(path, arrays)

    monkeypatch.setattr(checkpoint_writer, "save_arrays", full)
    arguments = (sources("schnell"), *FLOAT, "--dtype", "f32", "--out", out)
    assert run(*arguments) == 2
    assert "--resume goes on from there" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".out.pipeline"]
    assert run(*arguments) == 2
    assert "an interrupted conversion is in" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(*arguments, "--resume") == 0
    assert capsys.readouterr().out.count("the checkpoint had been finished") == 3
    expected = converted("schnell", *FLOAT)
    files = lambda top: {p.relative_to(top): p.read_bytes() for p in top.rglob("*") if p.is_file()}  # noqa: E731
    assert files(out) == files(expected)
    assert run(*arguments) == 2
    assert "exists already" in capsys.readouterr().err
