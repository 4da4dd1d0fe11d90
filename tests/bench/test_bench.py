"""`catversion bench`: what is in the report, how it hangs together, and what happens where a size does not fit."""

import json
import math
import re
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catversion_jax.base.pipeline import COMPONENTS, abstract
from catversion_jax.bench import kernels, machine, measure, random_model, step, timing
from catversion_jax.bench.row import COLUMNS, OURS, Row, bench_table, with_ratios
from catversion_jax.cli import bench as command
from catversion_jax.config import OF_A_RUN, Config, from_config_dict, stable_diffusion
from catversion_jax.models import attention
from catversion_jax.utils.errors import UserError
from tests.commands import catversion, error_of

STEPS = 2
SIZE = measure.Size(None, 2, 1, STEPS, vs_torch=False)


@pytest.fixture(scope="module")
def config(tiny_model):
    return Config().replaced({"model.path": str(tiny_model)})


@pytest.fixture(scope="module")
def report(tiny_model, tmp_path_factory) -> dict:
    """What the command writes for two sizes; its printed table under `stdout`."""
    out = tmp_path_factory.mktemp("bench") / "report.json"
    values = [f"--config.model.path={tiny_model}", "--config.train.text_penalty=0"]  # as in `config`
    flags = ["--config=configs/mini.py", *values, "--sizes=1x1,2x1", f"--steps={STEPS}"]
    done = catversion("bench", *flags, f"--out={out}")
    return json.loads(out.read_text()) | {"stdout": done.stdout}


def test_the_report_says_what_was_measured_on_what(report, tiny_model):
    expected = {"date", "jax", "platform", "device", "devices", "cores", "model", "weights", "dtype", "peak", "config"}
    assert report.keys() == expected | {"rows", "stdout"}
    assert report["model"] == report["config"]["model.path"] == str(tiny_model)
    assert (report["weights"], report["dtype"], report["platform"]) == ("its own", "float32", "cpu")
    assert [(row["concepts"], row["batch"]) for row in report["rows"]] == [(1, 1), (2, 1)]
    for row in report["rows"]:
        theirs = {"error", "ours_per_theirs", "ours_per_theirs_smallest"}
        assert {name for name, value in row.items() if value is None} == theirs
        assert row["repetitions"] == STEPS
        assert row["peak_memory_from"] == "program"
        assert row["compile_cached_s"] > 0  # None where the persistent cache was not hit


def test_rates_follow_from_the_times(report):
    for row in report["rows"]:
        images = row["concepts"] * row["batch"]
        assert 0 < row["ms_per_step_smallest"] <= row["ms_per_step"]
        assert row["images_per_s"] == pytest.approx(images / row["ms_per_step"] * 1e3)
        hours = report["config"]["train.steps"] * row["ms_per_step"] / 1e3 / 3600
        assert row["concepts_per_hour"] == pytest.approx(row["concepts"] / hours)
        assert row["flops_per_byte"] == pytest.approx(row["flops_per_step"] / row["bytes_per_step"])
        rate = row["flops_per_step"] / row["ms_per_step"] * 1e3
        assert row["utilisation"] == pytest.approx(rate / row["peak_flops_per_s"])


def test_flops_and_memory_grow_with_the_concepts(report):
    one, two = report["rows"]
    assert two["flops_per_step"] == pytest.approx(2 * one["flops_per_step"], rel=0.05)
    assert 0 < one["peak_memory_bytes"] < two["peak_memory_bytes"]


def test_the_table_has_a_line_for_each_row(report):
    lines = [line for line in report["stdout"].splitlines() if line.startswith("|")]
    assert lines[0].split(" | ")[1:-1] == list(COLUMNS)[1:-1]
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 1x1", "| 2x1"]
    assert f"device: {report['device']}" in report["stdout"]


def test_the_lowered_step_counts_as_the_compiled_one(report, config, tiny_pipeline):
    """Which is what an accelerator's FLOPs are taken from."""
    lowered = step.count_flops(replace(SIZE, config=config).measured_config(), tiny_pipeline.networks, SIZE.concepts)
    assert lowered == pytest.approx(report["rows"][1]["flops_per_step"], rel=0.05)


def test_wrong_sizes_are_refused_in_a_line():
    assert error_of("bench", "--sizes=4x2,3").startswith("catversion: error: --sizes=4x2,3: expected CONCEPTSxBATCH")
    for value in ("", "0x1", "1x-2", "1x2x3", "4,2"):
        with pytest.raises(UserError, match=re.escape(f"--sizes={value}")):
            command.parse_sizes(value)


@pytest.mark.parametrize(
    ("given", "others"),
    [
        (["--pictures=1", "--kernels"], "--kernels: cannot be combined with --pictures"),
        (["--for=h100", "--trace=t", "--vs=torch"], "--for: cannot be combined with --vs, --trace"),
        (["--pictures=1", "--steps=3"], "--pictures: cannot be combined with --steps"),
        (["--service=1x1", "--for=h100"], "--service: cannot be combined with --for"),
    ],
)
def test_flags_that_would_be_passed_over(given, others):
    assert error_of("bench", *given).startswith(f"catversion: error: {others}; leave one out")


def test_torch_is_missed_in_a_line():
    line = error_of("bench", "--vs=torch")
    assert line == "catversion: error: --vs=torch: no torch, no diffusers here; pip install torch diffusers"


def test_a_step_that_does_not_fit_is_not_run(monkeypatch):
    class Memory:
        available = 2**30

    monkeypatch.setattr(machine.psutil, "virtual_memory", Memory)
    machine.check_free(2**30)
    with pytest.raises(MemoryError, match=r"1\.5 GiB more are needed, 1\.0 GiB are free"):
        machine.check_free(3 * 2**29)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"), "allocating 9 bytes."),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "2.00 GiB"),
        (MemoryError("1.0 GiB more are needed"), "1.0 GiB more are needed"),
        (BrokenProcessPool("terminated abruptly"), "its process died, as it does where memory runs out"),
    ],
)
def test_a_size_that_does_not_fit_is_a_row(error, said, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(measure, "fresh", fail)
    facts, (row,) = measure.measure_size(SIZE)
    assert facts == {}
    assert row.error.endswith(said)
    assert {name for name, value in asdict(row).items() if value is not None} == {"what", "concepts", "batch", "error"}
    assert f"| {row.error} |" in bench_table([row])


def test_other_errors_are_not_hidden(monkeypatch):
    def fail(*_):
        raise RuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(measure, "fresh", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        measure.measure_size(SIZE)


def test_an_accelerators_flops_are_counted_apart(monkeypatch):
    ours = Row(OURS, 2, 1, ms_per_step=10.0, bytes_per_step=1e9, peak_flops_per_s=1e15)
    theirs = Row("torch_sdpa", 2, 1, ms_per_step=10.0)
    answers = {
        measure.measure: measure.Measured({"platform": "gpu"}, [ours, theirs], None, None),
        step.count_flops: 4e12,
    }
    monkeypatch.setattr(measure, "fresh", lambda function, *_: answers[function])
    _, (row, other) = measure.measure_size(SIZE)
    assert (row.flops_per_step, row.flops_per_byte) == (4e12, 4000)
    assert row.utilisation == pytest.approx(0.4)
    assert other == theirs


def test_contenders_take_turns():
    turns = []
    seconds = timing.take_turns({name: lambda name=name: turns.append(name) for name in "ab"}, 3)
    assert "".join(turns) == "ababab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_ratios_are_ours_by_theirs():
    rows = [Row(OURS, 1, 2, ms_per_step=30.0, ms_per_step_smallest=20.0)]
    rows += [Row("torch_sdpa", 1, 2, ms_per_step=60.0, ms_per_step_smallest=50.0)]
    rows += [Row("torch_authors", 1, 2, error="does not fit")]
    ratios = [(row.ours_per_theirs, row.ours_per_theirs_smallest) for row in with_ratios(rows)]
    assert ratios == [(None, None), (0.5, 0.4), (None, None)]


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks(kind, tera):
    rates = [rate / 1e12 for pattern, rate in machine.PEAKS.items() if re.fullmatch(pattern, kind)]
    assert rates == ([] if tera is None else [tera])


def test_random_weights_have_stable_diffusions_shapes():
    counts = {}
    for name in ("text", "unet"):
        shapes = abstract(name, COMPONENTS[name].make(random_model.RANDOM[name], jnp.bfloat16))
        counts[name] = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert counts == {"text": 123_060_480, "unet": 859_520_964}  # of the published weights


def test_random_weights_are_finite_and_in_the_asked_type(tiny_pipeline):
    shapes = abstract("unet", tiny_pipeline.networks.unet)["mid_block"]["resnets_0"]
    params = random_model.random_params(shapes, jnp.bfloat16)
    jax.tree.map(lambda leaf, shape: np.testing.assert_equal(leaf.shape, shape.shape), params, shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    kernel = np.asarray(params["conv1"]["kernel"], np.float32)
    assert float(kernel.std()) == pytest.approx((9 * 32) ** -0.5, rel=0.05)
    assert (params["conv1"]["bias"] == 0).all()
    assert (params["norm1"]["scale"] == 1).all()


def test_random_weights_stand_in_only_for_a_known_model_that_is_not_there(config, monkeypatch):
    def not_there(repo, *_):
        raise UserError(f"{repo}: not in the cache")

    monkeypatch.setattr("catversion_jax.weights.hub.fetch", not_there)
    published, unknown = (
        from_config_dict(stable_diffusion(name), OF_A_RUN) for name in (random_model.SD15, "someone/else")
    )
    assert measure.find_source(config) is not None
    assert measure.find_source(published) is None
    with pytest.raises(UserError, match="someone/else: not in the cache"):
        measure.find_source(unknown)


def test_a_service_under_load(tiny_model, tmp_path):
    """Its table, beside `catversion batch` on the same concepts: nothing is lost."""
    changes = {"model.path": tiny_model, "train.steps": 2, "sample.steps": 2, "sample.every": 0, "batch.slots": 2}
    flags = ["--config=configs/mini.py", *(f"--config.{key}={value}" for key, value in changes.items())]
    out = tmp_path / "load.json"
    done = catversion("bench", *flags, "--service=5x5", "--clients=2", f"--out={out}")
    found = json.loads(out.read_text())
    service = found["service"]
    assert (service["concepts"], service["pictures"], service["lost"], service["problems"]) == (5, 5, 0, [])
    assert service["images_per_second"] > 0 < found["batch"]["images_per_second"]
    for name in ("status_ms", "picture_seconds"):
        assert 0 < service[name]["p50"] <= service[name]["p95"]
    assert "| lost | 0 |" in done.stdout


def test_loads_that_are_none():
    assert "--service=x: expected CONCEPTSxPICTURES" in error_of("bench", "--config=configs/mini.py", "--service=x")


def test_a_profile_of_a_dispatch_is_kept(tiny_model, tmp_path):
    trace = tmp_path / "trace"
    flags = [f"--config.model.path={tiny_model}", "--sizes=1x1", "--steps=1", f"--trace={trace}"]
    catversion("bench", "--config=configs/mini.py", *flags)
    assert list((trace / "1x1").rglob("*.xplane.pb"))


def test_the_kernels_of_a_cpu_agree_with_float32(monkeypatch):
    monkeypatch.setattr(kernels, "SHAPES", ((64, 64, 8), (32, 77, 16)))
    for dtype, least in (("float32", 0), ("bfloat16", 1e-4)):
        rows = kernels.compare_kernels(dtype)
        assert [row.kernel for row in rows] == ["heads_first"] * 2
        assert all(row.agrees and row.value >= least for row in rows)
        assert kernels.parity_table(rows).count("heads_first") == 2


def test_a_kernel_that_is_wrong_is_found(monkeypatch, capsys, tmp_path):
    def wrong(query, key, value):
        return attention.heads_first(query, key, value) * 1.1

    monkeypatch.setattr(kernels, "SHAPES", ((64, 64, 8),))

    @jax.custom_vjp
    def lost(query, key, value):
        return attention.heads_first(query, key, value)

    lost.defvjp(
        lambda *given: (lost(*given), given), lambda given, gradient: (given[0], jnp.nan * given[1], 0 * given[2])
    )
    lost.__name__ = "lost"
    for run in (wrong, lambda *given: jnp.nan * wrong(*given), lost):
        monkeypatch.setitem(attention.KERNELS, "cpu", (attention.Kernel(run, attention.always),))
        assert command.bench_kernels(None, str(tmp_path / "out.json")) == 1
        assert "further from float32 than 1e-05" in capsys.readouterr().err
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["shape"] == [64, 64, 8]
