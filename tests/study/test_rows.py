"""What studies and sweeps keep: checked when it is read back, and of the photos that it says."""

import json
import shutil
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
from PIL import Image

from catversion_jax.base.pipeline import MINI
from catversion_jax.config import Config
from catversion_jax.data.concept_sets import ConceptFolder
from catversion_jax.study.rows import CandidateRow, CurveRow, GroupRows, ScoredRow
from catversion_jax.study.settings import QUICK
from catversion_jax.study.study import Study, once
from catversion_jax.study.sweep import Score, known_scores, override, sweep_table
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.records import append_line

CANDIDATE = {"group": "catversion", "name": "rate 1", "seconds": None, "numbers": 96, "fitness": [(1.0, 0.5)]}
WHOLE = json.dumps(CANDIDATE)
SCORE = Score("", "teapot", 0.5, 0.4, 0.72, 0.9, 0.25, 0.5, None, 1.0, 0.1, 0.2, 400)


@pytest.fixture
def folder(tmp_path) -> ConceptFolder:
    return ConceptFolder(shutil.copytree(MINI.parent / "concepts" / "teapot", tmp_path / "concepts" / "teapot"))


def test_a_row_is_computed_once(tmp_path):
    path = tmp_path / "row.json"
    assert once(path, CandidateRow, lambda: CANDIDATE) == CANDIDATE
    assert once(path, CandidateRow, lambda: pytest.fail("done already")) == CANDIDATE


@pytest.mark.parametrize("kind", [CandidateRow, ScoredRow, CurveRow, GroupRows])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        json.dumps(CANDIDATE)[:-5],
        json.dumps(CANDIDATE) * 2,
        json.dumps(CANDIDATE | {"group": [1]}),
        "\0",
    ],
)
def test_damaged_rows(tmp_path, kind, text):
    path = tmp_path / "row.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"row\.json: .*; expected a row of this study; remove it to compute it again"):
        once(path, kind, lambda: pytest.fail("is there"))


def test_damaged_images(tmp_path):
    study = Study(
        Config(), (), QUICK, tmp_path, SimpleNamespace(pipeline=SimpleNamespace(networks=SimpleNamespace(resolution=8)))
    )
    Image.new("RGB", (24, 8)).save(tmp_path / "a.png")
    assert len(study.images(tmp_path / "a.png")) == 3
    for size in ((20, 8), (24, 16)):
        Image.new("RGB", size).save(tmp_path / "a.png")
        with pytest.raises(UserError, match="expected images of this study"):
            study.images(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.png: empty file"):
        study.images(tmp_path / "a.png")


def test_a_study_is_of_its_photos(tmp_path, folder):
    """Those of the concepts' folders as they were; wherever the folders are, and by a study before it was recorded."""

    def claim(folder: ConceptFolder, out=tmp_path / "out") -> None:
        Study(Config(), (folder,), QUICK, out, SimpleNamespace()).claim()

    claim(folder)
    moved = ConceptFolder(shutil.copytree(folder.path, tmp_path / "moved" / "teapot"))
    claim(moved)
    (moved.path / "train" / "00.png").unlink()
    with pytest.raises(UserError, match=r"out: belongs to another config \(photos\.teapot: "):
        claim(ConceptFolder(moved.path))
    path = tmp_path / "out" / "study.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "photos"}))
    claim(moved)


def test_a_sweeps_scores(tmp_path, folder):
    path = tmp_path / "scores.jsonl"
    assert known_scores(path, [folder]) == []
    current = Score(**asdict(SCORE) | {"photos": folder.digest})
    for score in (SCORE, current):
        append_line(path, score)
    with path.open("a") as file:
        file.write('{"setting": "", "concept": ["tea')  # cut by a crash
    assert known_scores(path, [folder]) == [SCORE, current]
    append_line(path, SCORE)
    assert known_scores(path, [folder]) == [SCORE, current, SCORE]
    Image.new("RGB", (64, 64)).save(folder.path / "heldout" / "more.png")
    with pytest.raises(UserError, match=r"scores\.jsonl: scored on other photos of teapot; choose another --out"):
        known_scores(path, [ConceptFolder(folder.path)])


def test_a_table_of_what_was_measured():
    """No prompt asks for a place here; the overall score is the mean of the concepts' own."""
    low, high = (replace(SCORE, clip_i=clip_i) for clip_i in (0.5, 0.08))
    assert sweep_table([low, high]).count(" nan ") == 3
    *_, mean = sweep_table([low, high]).splitlines()
    cells = [cell.strip() for cell in mean.split("|")[1:-1]]
    overall = (0.72**0.5 * 0.5**0.5 + 0.72**0.5 * 0.08**0.5) / 2
    assert cells[5:11] == ["0.720", "0.900", f"{overall:.3f}", "0.600", "0.25", "0.50"]


@pytest.mark.parametrize("value", ["[" * 10**5, "\ud800", "NaN", "{", "1e999"])
def test_values_of_a_sweep(value):
    with pytest.raises(UserError, match=r"train\.learning_rate|learning_rate"):
        override(Config(), f"train.learning_rate={value}")
