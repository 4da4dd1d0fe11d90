"""`catversion evaluate` as a user runs it, on a tiny model, and each mistake in one line."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from catversion_jax.base.sampler_config import SamplerConfig
from catversion_jax.cli import evaluate
from catversion_jax.evaluation import encoders, evaluation, grabcut, metrics, page, samples, scores
from catversion_jax.evaluation.masks import FILL
from catversion_jax.evaluation.samples import ConceptTask, EvaluationConfig
from catversion_jax.methods import concept_file
from catversion_jax.methods.model_names import public_name
from catversion_jax.utils.errors import UserError
from tests import tiny
from tests.commands import ROOT, catversion

TEAPOT = ROOT / "catversion_jax" / "concepts" / "teapot"
REFERENCES = [f"--references={TEAPOT}/heldout", f"--masks={TEAPOT}/heldout_masks"]
FAST = ["--num=2", "--steps=2", "--unrelated=a car", "--unrelated=a red teapot"]
PROMPTS = ["a teapot on the beach", "a blue teapot"]


@pytest.fixture(scope="module")
def judging_model(tiny_model, tmp_path_factory) -> Path:
    """The tiny model with an image encoder."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("model") / "tiny")
    return tiny.write(folder, seed=1, changes=tiny.IMAGE_CHANGES)  # one whose cosines are positive


@pytest.fixture(scope="module")
def embedding(judging_model, tiny_pipeline, tmp_path_factory) -> Path:
    """A concept that every prompt sees."""
    path = tmp_path_factory.mktemp("embedding") / "concept.safetensors"
    prefix = 3 * np.random.default_rng(0).normal(size=(2, 3, 2, 2, 16)).astype(np.float32)
    tiny.save_run(path, tiny.concept(prefix, tiny_pipeline.fingerprint, judging_model))
    return path.parent


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> Path:
    return tiny.write_dino(tmp_path_factory.mktemp("encoders") / "dino")


@pytest.fixture(scope="module")
def drawn(embedding, dino, tmp_path_factory) -> Path:
    """The folder of an evaluation that drew its pictures."""
    out = tmp_path_factory.mktemp("evaluated") / "scores.json"
    prompts = [f"--prompt={prompt}" for prompt in PROMPTS]
    done = catversion(
        "evaluate", f"--embedding={embedding}", *REFERENCES, *FAST, *prompts, f"--dino={dino}", f"--out={out}"
    )
    assert f"4 images: {out}, {out.with_suffix('.html')}" in done.stdout
    return out


def test_every_score_of_drawn_pictures(drawn):
    result = json.loads(drawn.read_text())
    for name in (*scores.SCORES, "attention_mask_iou"):
        assert isinstance(result[name], float), name
        assert name in result["definitions"]
    assert result["prior_drift_text"] > 0.01
    assert result["overall"] == pytest.approx(np.sqrt(result["clip_t"] * result["clip_i"]))
    for name, (low, high) in ((n, i) for n, i in result["intervals"].items() if i):
        assert low <= result[name] <= high
    (concept,) = result["concepts"]
    assert [row["prompt"] for row in concept["prompts"]] == PROMPTS
    assert [row["pictures"] for row in concept["prompts"]] == [2, 2]
    assert [row["prompt"] for row in concept["unrelated"]] == ["a car"]  # the other one holds the class word
    assert concept["clip_i"] == pytest.approx(np.mean([row["clip_i"] for row in concept["prompts"]]))
    config = result["config"]
    assert config["drawing"]["seeds"] == [0, 1]
    assert config["background"] == {
        "fill_rgb": list(FILL), "masks_of_references": "files", "masks_of_pictures": "attention",
        "attention": {"timesteps": [0.05, 0.15, 0.25], "threshold": "Otsu"},
    }  # fmt: skip
    assert config["clip"]["size"] == 16
    assert config["dino"]["edge"] == 36
    assert {"catversion-jax", "jax", "python"} <= result["versions"].keys()


def test_the_report_holds_its_pictures(drawn):
    html = drawn.with_suffix(".html").read_text()
    shown = len(re.findall("data:image/jpeg;base64,", html))
    assert shown == len(re.findall(r'alt="[^"]*, \d+"', html))
    assert shown > 2 * len(PROMPTS)
    assert len(re.findall("data:image/png;base64,", html)) == 2
    assert "http" not in html.split("</head>")[1]
    for prompt in PROMPTS:
        assert prompt in html


def test_the_report_names_no_folder_of_this_machine(drawn, embedding, dino, judging_model):
    result = json.loads(drawn.read_text())
    names = {name: result["config"][name] for name in ("embedding", "references", "masks")}
    assert names == {"embedding": embedding.name, "references": "heldout", "masks": "heldout_masks"}
    assert result["config"]["dino"]["name"] == "dino"
    assert result["config"]["clip"]["name"] == "tiny"
    (concept,) = result["config"]["concepts"].values()
    assert concept["model_path"] == "tiny"
    for path in (drawn, drawn.with_suffix(".html")):
        for folder in (embedding, dino, judging_model, TEAPOT):
            assert str(folder.parent) not in path.read_text()


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("/home/me/models/sd15", "sd15"), ("~/models/sd15/", "sd15"), ("../me/sd15.safetensors", "sd15.safetensors"),
        ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
        ("the mini model", "the mini model"), ("", ""), ("a/b/c", "c"), (".", ROOT.name),
    ],
)  # fmt: skip
def test_public_names(source, shown, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert public_name(source) == shown
    assert public_name("catversion_jax/concepts") == "concepts"  # a folder that is here


@pytest.fixture(scope="module")
def generated(embedding, tmp_path_factory) -> Path:
    """The same pictures, by `catversion generate`, with a grid among them."""
    out = tmp_path_factory.mktemp("generated")
    prompts = [f"--prompt={prompt}" for prompt in PROMPTS]
    catversion("generate", f"--embedding={embedding}", *prompts, "--num=2", "--steps=2", f"--out={out}")
    assert (out / "grid.png").is_file()
    return out


def test_pictures_that_exist_get_the_same_scores(drawn, generated, judging_model, tmp_path):
    out = tmp_path / "scores.json"
    assert evaluate.main(flags(images=str(generated), model=str(judging_model), prompt=PROMPTS, out=str(out))) == 0
    result, before = json.loads(out.read_text()), json.loads(drawn.read_text())
    for name in ("clip_t", "clip_i", "overall", "diversity"):
        assert result[name] == pytest.approx(before[name], abs=1e-6)
        assert result["concepts"][0]["prompts"][1][name] == pytest.approx(
            before["concepts"][0]["prompts"][1][name], abs=1e-6
        )
    for name in ("masked_clip_i", "prior_drift", "prior_drift_text", "dino", "attention_mask_iou"):
        assert result[name] is None
    assert result["config"]["drawing"] is None
    assert "not measured" in out.with_suffix(".html").read_text()


def test_masks_of_both_sides(judging_model, tmp_path):
    """Against the same by hand, for pictures of several sizes: the photos one learns from, judged by the held-out."""
    arguments = flags(
        images=TEAPOT / "train", image_masks=TEAPOT / "train_masks", prompt=["a teapot"], masks=TEAPOT / "heldout_masks"
    )
    (task,) = evaluate.find_tasks(arguments)
    clip = encoders.of_model(judging_model)
    references, existing = samples.find_references(task), samples.find_images(task)
    found = scores.of_prompts(existing.prompts, existing.images, references, scores.Encoders(clip, None))
    sides = []
    for part in ("train", "heldout"):
        images = [np.array(Image.open(path).convert("RGB")) for path in sorted((TEAPOT / part).iterdir())]
        masks = [np.array(Image.open(path).convert("L")) for path in sorted((TEAPOT / f"{part}_masks").iterdir())]
        for image, mask in zip(images, masks, strict=True):
            image[mask < 128] = FILL
        sides.append(clip.image(images))
    assert found["a teapot"]["masked_clip_i"].mean() == pytest.approx(metrics.clip_i(*sides).mean(), abs=1e-6)
    assert found["a teapot"]["masked_clip_i"].mean() != pytest.approx(found["a teapot"]["clip_i"].mean(), abs=1e-4)


def task_of(embedding: Path, concept: concept_file.Concept, prompt: str) -> tuple[ConceptTask, EvaluationConfig]:
    task = ConceptTask("teapot", (prompt,), TEAPOT / "heldout", None, embedding, concept)
    sampler = SamplerConfig(2, 5.0, 2)
    return task, EvaluationConfig(sampler, (0, 1), 1.0, ("a car", "a red teapot"), "", "float32")


@pytest.mark.parametrize("scope", ["trigger", "all"])
def test_drift(embedding, judging_model, tiny_pipeline, scope, monkeypatch):
    """In the trigger scope nothing moves where the class word is not: not even a bit. The pictures are stand-ins, of
    which tests/sampling/test_sampler.py tells the same."""
    stored = concept_file.load(embedding)
    concept = dataclasses.replace(stored, method=dataclasses.replace(stored.method, scope=scope))
    _, config = task_of(embedding, concept, "a teapot")
    both = scores.Encoders(encoders.of_model(judging_model), None)
    images = np.random.default_rng(0).integers(0, 256, (2, 2, 16, 16, 3), np.uint8)

    def sample(pipeline, prompts, config, concepts=()):
        assert prompts == ("a car",)  # the other one holds the class word
        return list(images[0 if scope == "trigger" else len(concepts)])

    monkeypatch.setattr(samples, "sample", sample)
    moved = samples.measure_drift(tiny_pipeline, concept, config, both)["a car"]
    assert moved["prior_drift"].shape == (2,)
    if scope == "trigger":
        assert moved["prior_drift_text"].item() == moved["prior_drift"].max() == 0
    else:
        cosines = np.einsum("se,se->s", *map(both.clip.image, images))
        np.testing.assert_allclose(moved["prior_drift"], 1 - cosines, atol=1e-6)
        assert moved["prior_drift_text"].item() > 0.01


def test_grabcut(embedding, judging_model, tiny_pipeline, monkeypatch):
    """Both the images' masks and those of the references, by which they are measured, are redrawn: here by a stand-in,
    which turns them round."""
    concept = concept_file.load(embedding)
    task, config = task_of(embedding, concept, "a photo of a teapot")
    task = dataclasses.replace(task, masks=TEAPOT / "heldout_masks")
    images = [file.read(16).image for file in samples.find_references(task).files][:2]
    monkeypatch.setattr(samples, "sample", lambda *_: images)
    monkeypatch.setattr(samples, "grabcut", lambda image, mask: ~mask)
    both = scores.Encoders(encoders.of_model(judging_model), None)
    rough, cut = (
        samples.sample_task(tiny_pipeline, task, dataclasses.replace(config, grabcut=on), both) for on in (False, True)
    )
    np.testing.assert_array_equal(cut.images.masks, ~np.stack(rough.images.masks))
    assert cut.attention_mask_iou != rough.attention_mask_iou
    config = dataclasses.replace(config, grabcut=True)
    described = evaluation.describe([task], config, both, [{"masked_clip_i": 0.5}])
    assert described["background"]["masks_of_pictures"] == "attention, GrabCut"


def test_grabcut_without_opencv(monkeypatch):
    monkeypatch.setattr(grabcut.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"grabcut: OpenCV is not installed; pip install 'catversion-jax\[grabcut\]'"):
        evaluate.find_tasks(flags(embedding="a", grabcut=True))


def test_a_prompt_without_the_class_word(embedding, tiny_pipeline, judging_model):
    task, config = task_of(embedding, concept_file.load(embedding), "a car")
    with pytest.raises(UserError, match="prompt 'a car': no class word 'teapot', which the concept was learned with"):
        samples.sample_task(tiny_pipeline, task, config, scores.Encoders(encoders.of_model(judging_model), None))


def flags(**changes) -> SimpleNamespace:
    """The command's flags as they are by default, but for `changes`."""
    names = (
        "grabcut",
        "images",
        "masks",
        "image_masks",
        "prompts_file",
        "protocol",
        "manifest",
        "clip",
        "dino",
        "out",
    )
    given = dict.fromkeys((*names, "model")) | {
        "embedding": [],
        "prompt": [],
        "subject": [],
        "references": str(TEAPOT / "heldout"),
    }
    given |= {"unrelated": [], "num": 1, "seed": 0, "steps": 2, "guidance": 5.0, "batch_size": 2, "scheduler": ""}
    return SimpleNamespace(**given | {"strength": 1.0, "dtype": "float32"} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--embedding, --images: expected one of them"),
        ({"images": "a", "embedding": ["b"]}, "--embedding, --images: expected one of them"),
        ({"images": "a", "references": None}, "--references: missing; expected a folder of photos"),
        ({"images": "a"}, "--prompt: missing"),
        ({"embedding": ["a"], "image_masks": "b"}, "--image_masks: of --images"),
        ({"images": "a", "grabcut": True}, "--grabcut: of the masks from attention, with --embedding"),
        ({"embedding": ["a", "b"]}, "--embedding: a, b; expected one"),
        ({"embedding": ["nowhere"]}, "nowhere: not found; expected a learned concept"),
        ({"images": "a", "protocol": "dreambench", "prompt": ["b"]}, "--prompt: dreambench has its own prompts"),
        ({"images": "a", "protocol": "dreambench"}, "no photos of backpack, .*choose other subjects"),
        (
            {"images": "a", "protocol": "dreambench", "subject": ["x"]},
            "subject x: not of dreambench; expected one of",
        ),
        ({"images": "a", "protocol": "customconcept101"}, "dataset.json: not found; expected CustomConcept101's"),
    ],
)
def test_flags_that_do_not_fit(changes, message):
    with pytest.raises(UserError, match=message):
        evaluate.find_tasks(flags(**changes))


def read(**changes):
    (task,) = evaluate.find_tasks(flags(**{"prompt": ["a teapot"]} | changes))
    return list(samples.find_references(task)), list(samples.find_images(task).images)


def test_pictures_and_masks_that_do_not_match(tmp_path):
    (tmp_path / "masks").mkdir()
    with pytest.raises(UserError, match="0 photos; expected 1 to"):
        read(images=tmp_path / "masks")
    with pytest.raises(UserError, match="nowhere: no such folder; images takes a folder"):
        read(images=tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere: no such folder; references takes a folder"):
        read(images=TEAPOT / "train", references=tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere: no such folder; image_masks takes a folder"):
        read(images=TEAPOT / "train", image_masks=tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"heldout/05.png: no mask named 05\.\* among its masks"):
        read(images=TEAPOT / "train", masks=TEAPOT / "train_masks")
    with pytest.raises(UserError, match=r"train/00\.png: of none of the prompts; .*<prompt-slug>_<key>_<seed>.png"):
        read(images=TEAPOT / "train", prompt=PROMPTS)
    for folder in (tmp_path, tmp_path / "masks"):
        Image.new("RGB", (8, 8)).save(folder / "a-blue-teapot_0.png")
    with pytest.raises(UserError, match="no image of 1 prompts, such as 'a teapot on the beach'"):
        read(images=tmp_path, prompt=PROMPTS, image_masks=tmp_path / "masks")
    with pytest.raises(UserError, match=r"a-blue-teapot_0: .*a-blue-teapot_0\.png shows no subject"):
        read(images=tmp_path, image_masks=tmp_path / "masks")


@pytest.fixture
def scored(judging_model, tmp_path) -> SimpleNamespace:
    """The flags to score three pictures, quickly, whatever the prompt."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (80 * i, 0, 0)).save(folder / f"{i}.png")
    return flags(images=str(folder), model=str(judging_model), prompt=["a teapot"], out=str(tmp_path / "scores.json"))


@pytest.mark.parametrize("error", [ValueError("no\nfont"), RecursionError("deep"), MemoryError()], ids=lambda e: str(e))
def test_the_scores_stay_if_the_page_cannot_be_drawn(scored, monkeypatch, capsys, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(evaluate.page, "plot_plane", fail)
    with pytest.raises(UserError, match=r"scores\.html: cannot be drawn \(.*; the scores are complete in scores\.json"):
        evaluate.main(scored)
    result = json.loads(Path(scored.out).read_text())
    assert isinstance(result["clip_t"], float)
    assert capsys.readouterr().out.startswith(f"clip_t           {result['clip_t']:.3f}")


@pytest.mark.parametrize(
    "prompt",
    [
        "a teapot of $$",
        "a teapot for $5 and $\\frac{1}{$",
        "a teapot \u2603 \u8336\u58f6",
        "a teapot " * 400,
        "</pre><script>",
    ],
    ids=["dollars", "tex", "glyphs", "long", "html"],
)
def test_any_prompt_is_drawn(scored, prompt, recwarn):
    scored.prompt = [prompt]
    assert evaluate.main(scored) == 0
    html = Path(scored.out).with_suffix(".html").read_text("utf-8")
    assert "<script>" not in html
    assert not [warning for warning in recwarn.list if issubclass(warning.category, UserWarning)]


def test_a_folder_whose_name_is_no_utf8(scored):
    renamed = os.fsencode(scored.images) + b"_$$\xe9"
    os.rename(scored.images, renamed)
    scored.images = os.fsdecode(renamed)
    assert evaluate.main(scored) == 0
    assert r"pictures_$$\udce9" in Path(scored.out).with_suffix(".html").read_text("utf-8")


def test_numbers_that_json_lacks_are_null(scored, monkeypatch):
    odd = {"learning_rate": float("nan"), "nested": [{"bias": float("-inf"), "values": (1.0, float("inf"))}]}
    monkeypatch.setattr(evaluation, "describe", lambda *_: {"clip": {"name": "c"}, "dino": None, "odd": odd})
    assert evaluate.main(scored) == 0
    result = json.loads(Path(scored.out).read_text())
    assert result["config"]["odd"] == {"learning_rate": None, "nested": [{"bias": None, "values": [1.0, None]}]}
    # The images' base64 may hold these three letters.
    assert "NaN" not in re.sub(r"base64,[\w+/=]*", "", Path(scored.out).with_suffix(".html").read_text())


def test_a_benchmark_of_hundreds_of_prompts_says_what_its_grid_shows():
    units = {f"prompt {i}": {"clip_t": np.zeros(1), "clip_i": np.zeros(1)} for i in range(page.MAX_ROWS + 2)}
    row = {"concept": "a", "pictures": len(units), "references": 1} | scores.concept_row(units, {})
    result = scores.summarize([unit for unit in units.values()])
    result |= {"attention_mask_iou": None, "concepts": [row], "definitions": scores.DEFINITIONS, "versions": {}}
    thumbnail = page.thumbnail(np.zeros((8, 8, 3), np.uint8))
    html = page.render(result | {"config": {"clip": {"name": "c"}, "dino": None}}, {"a": {"references": [thumbnail]}})
    assert "The grid shows the first 40 of 42 prompts." in html


@pytest.mark.parametrize(
    ("name", "error"),
    [("x" * 251 + ".j", "File name too long"), ("/dev/null", "not a regular file"), ("a.json", "not a regular file")],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(scored, tmp_path, monkeypatch, name, error):
    """Of the first, the name fits and that of its report does not; of the last, the report's is a folder."""
    (tmp_path / "a.html").mkdir()
    scored.out = str(tmp_path / name)
    monkeypatch.setattr(evaluate, "load_encoders", lambda *_: pytest.fail("too late"))
    with pytest.raises((UserError, OSError), match=error):
        evaluate.main(scored)
