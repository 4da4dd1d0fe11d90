"""`catversion prepare`: what it writes is what training sees."""

import shutil

import numpy as np
from PIL import Image

from catversion_jax.data import concept_sets
from catversion_jax.data.photos import DataConfig, training_photos
from catversion_jax.evaluation.masks import iou
from tests.commands import catversion, error_of

TEAPOT = concept_sets.SHIPPED / "teapot"


def test_what_is_written_trains_as_the_source_does(tmp_path):
    for i, path in enumerate(sorted((TEAPOT / "train").glob("*.png"))):
        wide = Image.new("RGBA", (200, 90))  # a cutout far from the middle
        subject = Image.open(path).convert("RGBA")
        subject.putalpha(Image.open(TEAPOT / "train_masks" / path.name).convert("L"))
        wide.paste(subject.resize((80, 80)), (110 if i % 2 else 2, 5))
        (tmp_path / "photos").mkdir(exist_ok=True)
        wide.save(tmp_path / "photos" / path.name)
        if i < 2:
            (tmp_path / "photos" / f"{path.name}.txt").write_text(f"{{concept}} number {i}, in a long row of them")
    done = catversion("prepare", tmp_path / "photos", f"--out={tmp_path / 'ready'}", here=True)
    assert f"photos:   5, 5 with masks, 2 with captions, in {tmp_path / 'ready' / 'photos'}" in done.stdout
    seen, ready = (training_photos(DataConfig(dir=str(tmp_path / name)), 64) for name in ("photos", "ready/photos"))
    for ours, theirs in zip(seen, ready, strict=True):
        assert (ours.name, ours.caption) == (theirs.name, theirs.caption)
        np.testing.assert_array_equal(ours.image, theirs.image)
        np.testing.assert_array_equal(ours.mask, theirs.mask)
        assert ours.mask.any()
    sheet = Image.open(tmp_path / "ready" / "contact_sheet.png")
    assert sheet.height > 5 * 128


def test_masks_from_attention(tmp_path):
    """They meet those that the shipped concepts have, and are what training then takes."""
    for path in (TEAPOT / "train").glob("*.png"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "photos")
    word = "--config.concept.class_word=teapot"
    done = catversion("prepare", tmp_path / "photos", f"--out={tmp_path / 'ready'}", "--masks=auto", word, here=True)
    assert "photos:   5, 5 with masks, in" in done.stdout
    found = training_photos(DataConfig(dir=str(tmp_path / "ready" / "photos")), 64)
    true = training_photos(DataConfig(dir=str(TEAPOT / "train"), masks_dir=str(TEAPOT / "train_masks")), 64)
    for ours, theirs in zip(found, true, strict=True):
        assert iou(ours.mask, theirs.mask) > 0.8
    again = ("prepare", tmp_path / "photos", f"--out={tmp_path / 'again'}", "--masks=auto")
    assert "needs --config.concept.class_word" in error_of(*again)
    assert "leave out --resolution" in error_of(*again, word, "--resolution=32")
    assert "no class word 'teapot' to see" in error_of(*again, word, "--config.concept.templates=('a cup',)")
    ready = ("prepare", tmp_path / "ready" / "photos", *again[2:], word)
    assert "the photos have masks already" in error_of(*ready)


def test_a_folder_of_masks(tmp_path):
    out = f"--out={tmp_path / 'ready'}"
    said = catversion("prepare", TEAPOT / "train", out, f"--masks={TEAPOT / 'train_masks'}", here=True).stdout
    assert "photos:   5, 5 with masks, in" in said
    assert "no such folder; data.masks_dir" in error_of("prepare", TEAPOT / "train", f"{out}2", "--masks=none")


def test_warnings_and_mistakes(tmp_path):
    path = sorted((TEAPOT / "train").glob("*.png"))[0]
    for name in ("a", "b"):
        Image.open(path).resize((40, 40)).save(tmp_path / f"{name}.png")
    said = catversion("prepare", tmp_path, f"--out={tmp_path / 'ready'}", here=True).stderr
    assert "a: too small: 40x40, enlarged to 64" in said
    assert "b: nearly the same as a" in said
    assert "is there already" in error_of("prepare", tmp_path, f"--out={tmp_path / 'ready'}")
    assert "--out: missing" in error_of("prepare", tmp_path)
    assert "no such folder" in error_of("prepare", tmp_path / "none", f"--out={tmp_path / 'x'}")
