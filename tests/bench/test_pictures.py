"""`catversion bench --pictures` and what is said of programs for chips: pictures that are drawn, counted and timed."""

import json
from dataclasses import asdict, dataclass, replace

import jax
import numpy as np
import pytest

from catversion_jax.bench import forecast, picture_rate
from catversion_jax.bench.absent import CHIPS, Chip
from catversion_jax.bench.measure import Size
from catversion_jax.bench.pictures import PictureBatch, count_pictures, picture_shapes
from catversion_jax.config import Config
from catversion_jax.sampling.branches import branches_of, join_branches
from catversion_jax.sampling.conditioning import condition
from catversion_jax.sampling.sampler import SampleRequest, sample_images
from tests import tiny
from tests.commands import catversion, error_of

STEPS = 3


@pytest.fixture(scope="module")
def config(tiny_model):
    return Config().replaced({"model.path": str(tiny_model), "sample.steps": STEPS, "sample.scheduler": "ddim"})


def test_the_report(tiny_model, tmp_path):
    flags = [f"--config.model.path={tiny_model}", f"--config.sample.steps={STEPS}", f"--out={tmp_path / 'report.json'}"]
    done = catversion("bench", "--config=mini", *flags, "--pictures=1,2")
    found = json.loads((tmp_path / "report.json").read_text())
    assert (found["platform"], found["model"], found["dtype"]) == ("cpu", str(tiny_model), "float32")
    assert [row["pictures"] for row in found["rows"]] == [1, 2]
    for row in found["rows"]:
        assert (row["calls"], row["error"]) == (STEPS, None)
        assert row["first_s"] > row["pictures"] / row["pictures_per_s"] > 0
        whole = row["calls"] * row["call_ms"] + row["decoder_ms"]
        assert row["pictures_per_s"] == pytest.approx(1e3 * row["pictures"] / whole, rel=0.5)  # medians of their own
    assert [line.split(" | ")[0] for line in done.stdout.splitlines() if line.startswith("|")][2:] == ["| 1", "| 2"]


@pytest.mark.parametrize("value", ["", "0", "1,", "2x1", "99999"])
def test_numbers_of_pictures_that_are_none(value):
    assert error_of("bench", f"--pictures={value}").startswith(f"catversion: error: --pictures={value}: expected")


def test_a_batch_that_does_not_fit_is_a_row(monkeypatch, config):
    def fail(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(picture_rate, "fresh", fail)
    facts, row = picture_rate.measure_pictures(config, 512)
    assert facts == {}
    assert "| 512 | does not fit in memory: " in picture_rate.rate_table([row])


def test_it_draws_what_generate_draws(tiny_pipeline, config):
    """But for the prompt, whose states are random: with those of a prompt it is the same pictures."""
    sampler = config.sample.sampler
    batch = PictureBatch.random(tiny_pipeline.networks, sampler, 2, tiny_pipeline.params)
    context, _ = join_branches([branches_of(tiny_pipeline, "a dog", [])] * 2, [condition(tiny_pipeline, [""])])
    jax.tree.map(lambda ours, theirs: np.testing.assert_equal(ours.shape, theirs.shape), batch.guided.context, context)
    batch = replace(batch, guided=batch.guided._replace(context=context))
    images = sample_images(tiny_pipeline, SampleRequest(("a dog",) * 2, (0, 1), sampler))
    np.testing.assert_array_equal(batch.pixels(batch.latents()), list(images))


def test_flops_grow_with_the_pictures_and_with_guidance(tiny_pipeline, config):
    networks = tiny_pipeline.networks
    calls, one, decoder = count_pictures(networks, config.sample.sampler, 1)
    assert calls == STEPS
    of_two = count_pictures(networks, config.sample.sampler, 2)[1:]
    assert of_two == pytest.approx((2 * one, 2 * decoder), rel=0.02)
    unguided = config.replaced({"sample.guidance": 1.0}).sample.sampler
    assert count_pictures(networks, unguided, 2)[1] == pytest.approx(one, rel=0.02)


def test_sdxl(tmp_path):
    networks = tiny.load(tiny.write(tmp_path / "xl", changes=tiny.XL_CHANGES)).networks
    batch = PictureBatch.random(networks, Config().sample.sampler, 1, picture_shapes(networks))
    assert batch.guided.context.pooled.shape == (2, 1, 24)
    assert all(lowered.cost_analysis()["flops"] > 1e6 for lowered in batch.lower())


@dataclass(frozen=True)
class ThisOne(Chip):
    """The CPU of this machine, as if it were not here."""

    backend = "cpu"

    def topology(self):
        raise NotImplementedError

    def devices(self):
        return jax.devices("cpu")[:1]

    @property
    def flops(self) -> float:
        return 1e12


@pytest.fixture
def chip(monkeypatch) -> str:
    monkeypatch.setitem(CHIPS, "cpu", ThisOne("a CPU", 1e11, 1e9))
    monkeypatch.setattr(forecast, "fresh", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(forecast, "set_environment", lambda: None)
    return "cpu"


def test_what_pictures_should_cost(chip, config):
    row = forecast.forecast_pictures(config, 2, chip)
    assert (row.calls, row.pictures) == (STEPS, 2)
    for cost in (row.call, row.decoder):
        assert cost.kernels > 10
        assert cost.fits
        assert cost.ms_of_bytes == pytest.approx(cost.bytes / 1e8)
        assert cost.ms_of_flops == pytest.approx(cost.flops / 1e9)
        assert cost.ms == max(cost.ms_of_bytes, cost.ms_of_flops)
    assert row.pictures_per_s == pytest.approx(2e3 / (STEPS * row.call.ms + row.decoder.ms))
    table = forecast.picture_table([row])
    assert f"| 2, a call of the UNet | {row.pictures_per_s:.2f} by {STEPS} calls |" in table
    assert "2, the decoder:\n| kernels |" in table
    assert json.loads(json.dumps(asdict(row)))["decoder"]["kernels"] == row.decoder.kernels


def test_what_a_step_should_cost(chip, config):
    of_one, of_two = (
        forecast.forecast_step(Size(config, concepts, 2, steps=None, vs_torch=False), chip) for concepts in (1, 2)
    )
    assert of_two.step.flops == pytest.approx(2 * of_one.step.flops, rel=0.05)
    assert of_one.step.memory_bytes < of_two.step.memory_bytes
    table = forecast.step_table([of_one, of_two])
    assert f"| 2x2 | {of_two.images_per_s:.0f} | {of_two.step.kernels} |" in table
