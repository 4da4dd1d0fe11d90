"""The public benchmarks' folders, as they are published, and a run over one."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from catversion_jax.cli import evaluate
from catversion_jax.data import manifest
from catversion_jax.evaluation import benchmarks
from catversion_jax.sampling.image_names import unique_slugs
from catversion_jax.utils.errors import UserError
from tests.conftest import DREAMBOOTH, needs_dreambooth
from tests.evaluation.test_evaluate import flags


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def test_dreambench_has_30_subjects_of_25_prompts(tmp_path):
    subjects = benchmarks.dreambench(tmp_path)
    assert len(subjects) == 30
    assert all(len(set(subject.prompts)) == 25 for subject in subjects)
    live = [s for s in subjects if any("chef outfit" in prompt for prompt in s.prompts)]
    assert len(live) == 9
    assert {s.class_word for s in live} == benchmarks.LIVE_CLASSES
    assert all(s.class_word in prompt for s in subjects for prompt in s.prompts)
    assert benchmarks.IMAGES_PER_PROMPT == 4


@needs_dreambooth
def test_the_built_in_table_is_the_published_one():
    public = benchmarks.read_subjects("dreambench", DREAMBOOTH, [])
    path = DREAMBOOTH / "prompts_and_classes.txt"
    assert path.is_file()
    assert benchmarks.read_dreambench(path) == (benchmarks.CLASSES, benchmarks.OBJECT_PROMPTS, benchmarks.LIVE_PROMPTS)
    assert [s.name for s in public] == [*benchmarks.CLASSES]


def test_another_table_in_the_folder_is_read(tmp_path):
    lists = "prompt_list = [\n'a {0} {1} in a box'.format(unique_token, class_token),\n]\n"
    path = tmp_path / "prompts_and_classes.txt"
    path.write_text(
        f"Classes\n\nsubject_name,class\nmine,mug\nrex,dog\n\nPrompts\n{lists}{lists.replace('box', 'hat')}"
    )
    mine, rex = benchmarks.dreambench(tmp_path)
    assert (mine.class_word, mine.prompts) == ("mug", ("a mug in a box",))
    assert (rex.photos, rex.prompts) == (tmp_path / "rex", ("a dog in a hat",))
    path.write_text("something else")
    with pytest.raises(UserError, match="expected DreamBench's table of classes and two lists of prompts"):
        benchmarks.dreambench(tmp_path)


@pytest.fixture
def customconcept101(tmp_path) -> Path:
    """Two subjects in the published layout."""
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "cup.txt").write_text("Photo of a {}.\n{} in a pool.\n\n")
    entries = [
        {
            "instance_prompt": "photo of a <new1> cup",
            "class_prompt": "cup",
            "instance_data_dir": f"./benchmark_dataset/things_cup{i}",
            "class_data_dir": "./regularization/things_cup",
            "prompt_filename": "prompts/cup.txt",
        }
        for i in (1, 2)
    ]
    (tmp_path / "dataset.json").write_text(json.dumps(entries))
    for i in (1, 2):
        picture(tmp_path / "benchmark_dataset" / f"things_cup{i}" / "0.jpeg", i)
    return tmp_path


def test_customconcept101(customconcept101):
    first, second = benchmarks.read_subjects("customconcept101", customconcept101, [])
    assert (first.name, first.class_word) == ("things_cup1", "cup")
    assert first.photos.is_dir()
    assert second.prompts == ("Photo of a cup.", "cup in a pool.")
    (customconcept101 / "prompts" / "cup.txt").unlink()
    with pytest.raises(
        UserError,
        match=r"cup\.txt: cannot be read \(No such file or directory\); expected the prompts of things_cup1, which ",
    ):
        benchmarks.read_subjects("customconcept101", customconcept101, [])
    (customconcept101 / "dataset.json").write_text('[{"class_prompt": "cup"}]')
    with pytest.raises(UserError, match=r"field `instance_data_dir`.*; expected CustomConcept101's dataset\.json"):
        benchmarks.read_subjects("customconcept101", customconcept101, [])


def test_a_benchmark_of_pictures_that_exist(customconcept101, tmp_path_factory):
    """From pictures by subject to one file of scores."""
    folder = tmp_path_factory.mktemp("benchmark")
    for i, subject in enumerate(benchmarks.read_subjects("customconcept101", customconcept101, [])):
        for j, slug in enumerate(unique_slugs(list(subject.prompts))):
            for seed in range(2):
                picture(folder / "pictures" / subject.name / f"{slug}_{seed}.png", 10 * i + 3 * j + seed)
    out = folder / "scores.json"
    given = {"protocol": "customconcept101", "references": str(customconcept101), "images": str(folder / "pictures")}
    assert evaluate.main(flags(**given, out=str(out))) == 0
    result = json.loads(out.read_text())
    first, second = result["concepts"]
    assert [first["concept"], second["concept"]] == ["things_cup1", "things_cup2"]
    assert [len(row["prompts"]) for row in (first, second)] == [2, 2]
    for name in ("clip_t", "clip_i", "diversity"):
        assert result[name] == pytest.approx((first[name] + second[name]) / 2)
        ends = sorted((first[name], second[name]))
        assert result["intervals"][name] == pytest.approx(ends)  # two concepts: from one drawn twice to the other
    assert result["masked_clip_i"] is None
    assert result["config"]["protocol"] == "customconcept101"
    html = out.with_suffix(".html").read_text()
    assert html.count("data:image/jpeg") == html.count("<img ") - 2  # and two plots
    assert all(f"<h2>{concept}<" in html for concept in (row["concept"] for row in result["concepts"]))


def test_the_manifest_is_one_for_batch(customconcept101, tmp_path):
    path = tmp_path / "concepts.jsonl"
    path.write_text(benchmarks.manifest(benchmarks.read_subjects("customconcept101", customconcept101, [])))
    lines = list(manifest.read_manifest(path))
    assert [line.id for line in lines] == ["things_cup1", "things_cup2"]
    assert all(line.class_word == "cup" and Path(line.dir).is_dir() for line in lines)


TABLE = b"subject_name,class\r\nmine,mug\r\n\r\nprompt_list = [\r\n'a {0} {1} here'.format(a, b),\r\n]\r\n"


def test_a_table_with_other_line_breaks(tmp_path):
    path = tmp_path / "prompts_and_classes.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TABLE + TABLE.split(b"mug")[1])
    (mine,) = benchmarks.dreambench(tmp_path)
    assert (mine.class_word, mine.prompts) == ("mug", ("a mug here",))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TABLE.replace(b"mug", b"caf\xe9"), "not UTF-8 at byte"),
        (b"\0" * (2**20 + 1), "larger than 1 MiB"),
        (b"prompt_list = [" * 60_000, "expected DreamBench's table"),
        (b"subject_name,class\n" + b"a," * 400_000, "expected DreamBench's table"),
    ],
    ids=["latin1", "large", "lists", "commas"],
)
def test_tables_that_are_none(tmp_path, data, message):
    path = tmp_path / "prompts_and_classes.txt"
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"prompts_and_classes\.txt: {message}"):
        benchmarks.dreambench(tmp_path)


@pytest.mark.parametrize("name", ["dataset.json", "prompts/cup.txt"])
def test_a_benchmark_of_a_device(customconcept101, name):
    (customconcept101 / name).unlink()
    (customconcept101 / name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=rf"{name}: not a regular file; expected"):
        benchmarks.read_subjects("customconcept101", customconcept101, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: b"[" * 100_000, r"dataset\.json: "),
        (lambda data: data.replace(b'"cup"', b'"\xe9"'), r"dataset\.json: "),
        (lambda data: data.replace(b'"cup"', b'["cup"]'), r"Expected `str`, got `array` - at `\$\[0\]\.class_prompt`"),
        (lambda data: data.replace(b'"cup"', b'" "'), "no prompts or no class_prompt"),
        (lambda data: data.replace(b"prompts/cup.txt", b"prompts/\\u0000"), "holds a NUL"),
        (lambda data: data.replace(b"prompts/cup.txt", b"prompts"), "not a regular file"),
        (lambda _: b"[]", "no subjects"),
        (lambda _: b"{}", "Expected `array`"),
    ],
)
def test_datasets_that_are_none(customconcept101, change, message):
    path = customconcept101 / "dataset.json"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message) as error:
        benchmarks.read_subjects("customconcept101", customconcept101, [])
    assert "\n" not in str(error.value)


def test_prompts_that_are_empty_or_no_text(customconcept101):
    path = customconcept101 / "prompts" / "cup.txt"
    path.write_text("\n \n")
    with pytest.raises(UserError, match="things_cup1: no prompts"):
        benchmarks.read_subjects("customconcept101", customconcept101, [])
    path.write_bytes("Photo d'un {} caf\u00e9".encode("latin-1"))
    with pytest.raises(UserError, match=r"cup\.txt: not UTF-8 at byte"):
        benchmarks.read_subjects("customconcept101", customconcept101, [])
