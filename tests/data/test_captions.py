"""Caption files beside photos: which photo each belongs to, and what it says."""

import unicodedata
import zipfile

import pillow_heif
import pytest
from PIL import Image

from catversion_jax.data import dataset
from catversion_jax.data.photos import DataConfig, count_photos, training_photos
from catversion_jax.utils.errors import UserError

pillow_heif.register_heif_opener()


def photos(folder, *names):
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        Image.new("RGB", (16, 16), (200, 20 * i, 20)).save(folder / name)


def captions(folder, **settings) -> dict[str, str]:
    return {photo.name: photo.caption for photo in training_photos(DataConfig(dir=str(folder), **settings), 16)}


@pytest.mark.parametrize("name", ["a.txt", "a.caption", "a.TXT", "A.txt", "a.jpg.txt", "a.JPG.caption"])
def test_names(tmp_path, name, caplog):
    photos(tmp_path, "a.jpg", "b.png")
    (tmp_path / name).write_text("{concept} on a table\n")
    assert captions(tmp_path) == {"a": "{concept} on a table", "b": ""}
    assert caplog.messages == []
    assert count_photos(DataConfig(dir=str(tmp_path))) == (2, 1)
    assert captions(tmp_path, captions=False) == {"a": "", "b": ""}
    assert count_photos(DataConfig(dir=str(tmp_path), captions=False)) == (2, 0)


@pytest.mark.parametrize("name", ["a.txt", "a.heic.txt"])
def test_beside_what_phones_write(tmp_path, name):
    photos(tmp_path, "a.heic", "b.avif")
    (tmp_path / name).write_text("{concept}")
    assert captions(tmp_path) == {"a": "{concept}", "b": ""}


def test_accents_in_one_character_or_two(tmp_path):
    composed, apart = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    photos(tmp_path, f"{apart}.jpg")
    (tmp_path / f"{composed}.jpg.txt").write_text("{concept}")
    assert captions(tmp_path) == {composed: "{concept}"}


def test_names_that_differ_by_case_alone(tmp_path):
    photos(tmp_path, "a.jpg", "A.jpg")
    for name in ("a", "A"):
        (tmp_path / f"{name}.txt").write_text(f"{name} {{class_word}}")
    assert captions(tmp_path) == {"a": "a {class_word}", "A": "A {class_word}"}


@pytest.mark.parametrize("name", ["README.txt", "urls.txt", "a.json", "a.tags", "b.txt", "a-mask.txt"])
def test_other_texts_are_named_and_not_used(tmp_path, name, caplog):
    photos(tmp_path, "a.jpg")
    (tmp_path / name).write_text("a teapot")
    assert captions(tmp_path) == {"a": ""}
    assert caplog.messages == [f"{tmp_path}: files that are no photos are not used: {name}"]


@pytest.mark.parametrize(
    ("content", "caption", "warning"),
    [
        (b"a mug", "a mug", ""),
        (b"\xef\xbb\xbf  a\tmug \r\n", "a mug", ""),
        ("une théière".encode(), "une théière", ""),
        (b"\n\na mug\n\n", "a mug", ""),
        (b"a mug\na cup\n", "a mug", "a.txt: 2 lines; the first one is the caption"),
        (b" \n", "", "a.txt: an empty caption; its photo has the templates' prompts"),
        (b"", "", "a.txt: an empty caption"),
    ],
)
def test_what_a_caption_says(tmp_path, content, caption, warning, caplog):
    photos(tmp_path, "a.jpg")
    (tmp_path / "a.txt").write_bytes(content)
    assert captions(tmp_path) == {"a": caption}
    assert [warning in message for message in caplog.messages] == [True] * bool(warning)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfea\0", "a.txt: not UTF-8 at byte 0; expected a caption of one line"),
        (b"a\x07 mug", "a.txt: holds control characters"),
        (b"a mug " * 20_000, "a.txt: larger than"),
    ],
)
def test_captions_that_are_refused(tmp_path, content, message):
    photos(tmp_path, "a.jpg")
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError) as error:
        captions(tmp_path)
    assert message in str(error.value)


def test_two_captions_of_one_photo(tmp_path):
    photos(tmp_path, "a.jpg")
    for name in ("a.txt", "a.jpg.txt"):
        (tmp_path / name).write_text("a mug")
    with pytest.raises(UserError, match=r"a\.jpg\.txt, .*a\.txt: two captions of one photo; expected one"):
        captions(tmp_path)


def test_in_a_zip_file(tmp_path):
    photos(tmp_path / "mug", "a.jpg", "b.jpg")
    (tmp_path / "mug" / "b.txt").write_text("a mug")
    with zipfile.ZipFile(tmp_path / "mug.zip", "w") as archive:
        for path in (tmp_path / "mug").iterdir():
            archive.write(path, path.name)
    assert captions(tmp_path / "mug.zip") == {"a": "", "b": "a mug"}
    assert count_photos(DataConfig(dir=str(tmp_path / "mug.zip"))) == (2, 1)


def test_a_dataset_keeps_them(tmp_path):
    photos(tmp_path / "mug", "a.jpg", "b.jpg")
    (tmp_path / "mug" / "b.txt").write_text("{concept}, 湯呑み")
    found = training_photos(DataConfig(dir=str(tmp_path / "mug")), 16)
    dataset.write_dataset(tmp_path / "data", found)
    stored = dataset.read_dataset(tmp_path / "data")
    assert [photo.caption for photo in stored] == ["", "{concept}, 湯呑み"]
    assert dataset.are_equal(found, stored)
    (tmp_path / "mug" / "b.txt").write_text("{concept}")
    assert not dataset.are_equal(training_photos(DataConfig(dir=str(tmp_path / "mug")), 16), stored)
