"""`catversion study`: the tables from training to the numbers, on the tiny model; what is done is not done again."""

import copy
import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from catversion_jax.base.pipeline import MINI
from catversion_jax.cli import study as command
from catversion_jax.config import OF_A_RUN, from_config_dict
from catversion_jax.data.concept_sets import ConceptFolder
from catversion_jax.data.prompts import fill
from catversion_jax.evaluation.image_sets import MaskedImages
from catversion_jax.methods.registry import METHODS
from catversion_jax.study import accuracy, scoring, settings, study, table, tables, together
from catversion_jax.study.scoring import Scorer
from catversion_jax.study.settings import Setting
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.paths import expand
from configs.mini import get_config
from tests import tiny
from tests.commands import error_of

SHIPPED = MINI.parent / "concepts"
BASELINES = (
    Setting("catversion", "rate 0.01", {"method": "catversion", "train.learning_rate": 0.01}),
    Setting("catversion", "rate 1", {"method": "catversion", "train.learning_rate": 1.0}),
    Setting("dreambooth", "rate 0.001", {"method": "dreambooth", "train.learning_rate": 1e-3}),
)
ABLATION = (
    settings.ABLATION[0],
    Setting("class word", "none", {"adapter.scope": "all", "concept.templates": ("a photo",)}),
    Setting("parts", "keys only", {"adapter.parts": ("key",)}),
    Setting("strength", "0.3", {}, strength=0.3),
)


@pytest.fixture(scope="module")
def arguments(tiny_model, tmp_path_factory):
    """The quick tables of two concepts, two prompts and two steps."""
    folder = tmp_path_factory.mktemp("study")
    model = tiny.write(shutil.copytree(tiny_model, folder / "model"), seed=1, changes=tiny.IMAGE_CHANGES)
    config = get_config()
    config.update_from_flattened_dict({
        "model.path": str(model), "adapter.layers": (1, 2, 3), "adapter.length": 1, "prior.pictures": 2,
        "sample.steps": 2, "sample.batch_size": 2,
    })  # fmt: skip
    return SimpleNamespace(config=config, concepts=str(SHIPPED), out=str(folder / "out"), quick=True)


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        quick = replace(settings.QUICK, steps=2, prompts=2, seeds=2, unrelated=1)
        three = replace(quick, concepts=("teapot", "dog", "backpack"), unrelated=0)
        scales = {"rivals": quick, "ablation": quick, "together": three}
        patch.setattr(tables, "TABLES", {k: kind._replace(quick=scales[k]) for k, kind in tables.TABLES.items()})
        patch.setattr(tables, "BASELINES", BASELINES)
        patch.setattr(tables, "ABLATION", ABLATION)
        yield


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]


def test_rivals(arguments, small, monkeypatch, capsys):
    assert command.main(arguments, "rivals") == 0
    out = expand(arguments.out) / "rivals-quick"
    text = (out / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert "Concepts: teapot, dog; 2 steps of 2, seed 0." in re.sub(r"\s+", " ", text)
    header, _, base, ours, dreambooth = cells(text)[:5]
    accuracies, candidates, curves = cells(text)[5:10], cells(text)[10:15], cells(text)[15:]
    assert header[2:6] == ["CLIP-T", "CLIP-I", "masked CLIP-I", "overall"]
    assert (base[0], base[7], base[9]) == ("base model", "0.000 [0.000, 0.000]", "")
    assert ours[0] == "catversion"
    assert dreambooth[0] == "dreambooth"
    assert float(dreambooth[7].split()[0]) > 0
    fitness = {
        (row[0], row[1], x): float(row[2 + i]) for row in candidates[2:] for i, x in enumerate(settings.STRENGTHS)
    }
    chosen = {row[0]: (row[1], float(row[5].removeprefix("at "))) for row in candidates[2:] if row[5]}
    for method, (name, strength) in chosen.items():
        of_method = {key: x for key, x in fitness.items() if key[0] == method}
        assert fitness[method, name, strength] == max(of_method.values())
    better, strength = chosen["catversion"]
    assert ours[1] == f"{better}, strength {strength:g}"
    assert [row[2:] for row in accuracies[2:]] == [["not measured"] * 6] * 3  # the tiny model has no world.json
    assert [row[0] for row in curves[2:]] == ["catversion", "dreambooth"]
    assert len(curves[0]) == 1 + len(settings.CURVE)
    assert Image.open(out / "strengths.png").width > 500
    row = json.loads((out / f"catversion-{better.replace(' ', '-')}-strength-{strength:g}" / "row.json").read_text())
    assert row["numbers"] == 3 * 2 * 2 * 16
    assert row["seconds"] > 0
    assert row["clip_i"] == pytest.approx(np.mean([concept["clip_i"] for concept in row["concepts"]]))
    for name in ("teapot", "dog"):
        assert Image.open(out / f"{name}.png").height > 4 * 128

    def refuse(*_):
        raise AssertionError("done already")

    monkeypatch.setattr(study, "train_setting", refuse)
    monkeypatch.setattr(Scorer, "score", refuse)
    assert command.main(arguments, "rivals") == 0
    assert cells((out / "table.md").read_text()) == cells(text)
    other = copy.copy(arguments)
    other.config = get_config()
    with pytest.raises(
        UserError, match=r"rivals-quick: belongs to another config .*; give the same one, or another folder"
    ):
        command.main(other, "rivals")


def test_ablation_goes_on_where_it_was_interrupted(arguments, small, monkeypatch):
    """Interrupted after a setting was learned and before it was judged: it is judged, and not learned again."""
    out = expand(arguments.out) / "ablation-quick"
    score, scored = Scorer.score, []

    def interrupted(scorer, concepts, folders):
        scored.append(concepts["dog"].method)
        if len(scored) == 4:
            raise KeyboardInterrupt
        return score(scorer, concepts, folders)

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score", interrupted)
        with pytest.raises(KeyboardInterrupt):
            command.main(arguments, "ablation")
    assert not (out / "table.md").exists()
    last = out / "parts-keys-only" / "dog" / "concept.safetensors"
    before = last.stat().st_mtime_ns
    monkeypatch.setattr(Scorer, "score", lambda *rest: scored.append("again") or score(*rest))
    assert command.main(arguments, "ablation") == 0
    assert scored[4:] == ["again", "again"]
    assert last.stat().st_mtime_ns == before
    rows = cells((out / "table.md").read_text())
    labels = [["base model", ""], *([setting.group, setting.name] for setting in ABLATION)]
    assert [row[:2] for row in rows[2:7]] == [row[:2] for row in rows[9:]] == labels
    # Another strength is another way to sample the config's concepts: nothing is trained for it.
    assert not (out / "strength-0.3" / "dog").exists()
    whole, half = (
        json.loads((out / name / "row.json").read_text()) for name in ("config-configs-mini.py", "strength-0.3")
    )
    assert whole["numbers"] == half["numbers"]
    assert whole["clip_i"] != half["clip_i"]


def test_prompts_of_several_concepts():
    folders = [ConceptFolder(SHIPPED / name) for name in ("teapot", "owl", "rocket")]
    asked = together.prompts(folders, ("a photo of {concept} at night", "a photo of a blue {class_word}"))
    assert asked == (
        "a photo of a teapot, an owl and a rocket at night",
        "a photo of a blue teapot, an owl and a rocket",
    )
    for template in get_config().sample.prompts:
        fill(template, "teapot and a dog", "a")


def test_the_best_setting_has_a_score():
    """Not that of which the score has no value, whichever came first."""
    rates = [Setting("dreambooth", name, {}) for name in ("broken", "good", "worse")]
    fitness = ([(0.5, None), (1.0, None)], [(0.5, 0.3), (1.0, 0.5)], [(0.5, 0.4), (1.0, None)])
    found = {rate: {"fitness": each} for rate, each in zip(rates, fitness, strict=True)}
    assert tables.best_of(found) == (rates[1], 1.0)


def test_a_concepts_description_is_read_with_care(tmp_path):
    for text in ('{"class_word": "teapot"}', '{"class_word": "teapot", "article": 1}', "[]"):
        (tmp_path / "concept.json").write_text(text)
        with pytest.raises(UserError, match=r"concept\.json: .*; expected the texts class_word and article"):
            print(ConceptFolder(tmp_path).description)


def test_together(arguments, small):
    assert command.main(arguments, "together") == 0
    out = expand(arguments.out) / "together-quick"
    rows = cells((out / "table.md").read_text())[2:]
    names = ["teapot and dog", "teapot and backpack", "dog and backpack", "teapot and dog and backpack"]
    assert list(dict.fromkeys(row[0] for row in rows)) == names
    for name in names:
        of_group = [row for row in rows if row[0] == name]
        assert [row[1] for row in of_group] == name.split(" and ")
        assert all(-1 <= float(value) <= 1 for row in of_group for value in row[2:5])
        shown = [float(row[5].rstrip("%")) for row in of_group]
        assert float(of_group[0][6].rstrip("%")) <= min(shown)
        assert Image.open(out / f"{name.replace(' ', '-')}.png").height > 2 * 128


def test_the_tables_settings_can_be_had(mini):
    """Every row is a config that the mini model can learn."""
    groups = {}
    for setting in (*settings.BASELINES, *settings.ABLATION):
        config = get_config()
        config.update_from_flattened_dict(setting.changes)
        from_config_dict(config, unset=OF_A_RUN).make_method(mini.networks)
        groups.setdefault(setting.group, []).append(setting.name)
    assert groups.keys() >= METHODS.keys()
    for method, rates in settings.RATES.items():
        assert get_config(method).train.learning_rate in rates
    assert len({len(groups[method]) for method in METHODS}) == 1  # an equal budget


def test_baselines_are_trained_without_what_only_catversion_has():
    ours, theirs = (from_config_dict(get_config(method), unset=OF_A_RUN) for method in ("catversion", "dreambooth"))
    differing = {key for key, value in ours.identity().items() if theirs.identity()[key] != value}
    assert differing == {*settings.UNTUNED, "method", "train.learning_rate"}
    assert theirs.replaced(settings.UNTUNED) == theirs


def test_what_is_not_known_is_left_empty():
    row = {"group": "a", "name": "b", "seconds": None, "numbers": 1234, "intervals": {}}
    scores = dict.fromkeys(
        ("clip_t", "clip_i", "masked_clip_i", "overall", "prior_drift", "prior_drift_text", "copied")
    )
    *_, line = cells(table.of_scores([row | scores | {"intervals": scores}]))
    assert line == ["a", "b", *["not measured"] * 7, "1,234", ""]
    *_, line = cells(table.of_accuracies([row | {"accuracy": dict.fromkeys(accuracy.NAMES)}]))
    assert line == ["a", "b", *["not measured"] * 6]


def test_copied():
    """The backgrounds alone are compared: all pairs, by hand."""
    rng = np.random.default_rng(0)
    images, masks = rng.integers(0, 256, (5, 4, 4, 3), np.uint8), rng.random((5, 4, 4)) < 0.5

    def embed(pictures):
        flat = np.stack(pictures).reshape(len(pictures), -1).astype(np.float64)
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    encoders = SimpleNamespace(clip=SimpleNamespace(image=embed))
    drawn, learned_from = (MaskedImages(list(images[part]), list(masks[part])) for part in (slice(2), slice(2, 5)))
    without = [
        np.where(mask[..., None], (122, 116, 104), image).ravel() for image, mask in zip(images, masks, strict=True)
    ]
    cosines = [a @ b / np.sqrt((a @ a) * (b @ b)) for a in without[:2] for b in without[2:]]
    assert scoring.copied(drawn, learned_from, encoders) == pytest.approx(np.mean(cosines))


def test_mistakes(tmp_path):
    assert error_of("study", "nothing").endswith("nothing: no such table; expected one of rivals, ablation, together")
    assert f"{tmp_path}: no concepts" in error_of("study", "rivals", f"--concepts={tmp_path}")
    with pytest.raises(UserError, match="no concepts"):
        command.main(SimpleNamespace(config=get_config(), concepts=str(tmp_path), out="", quick=True), "rivals")
