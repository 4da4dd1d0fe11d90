"""What people keep beside their photos: captions, films, links, masks under many names; nothing of it is silent."""

import os
import time
import unicodedata

import numpy as np
import pytest
from PIL import Image

from catversion_jax.data import photo_folder
from catversion_jax.data.photos import DataConfig, count_photos, describe_masks, find_photos, read_photos
from catversion_jax.utils.errors import UserError

SIZE = (16, 12)
SUBJECT = (4, 3, 12, 9)  # a quarter
COMPOSED, TAKEN_APART = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


def photo_count(folder) -> int:
    return count_photos(DataConfig(dir=str(folder))).photos


def photo(path, size=SIZE):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, (200, 20, 20)).save(path)


def mask(path, mode="L", outside=0, inside=255, box=SUBJECT):
    """A mask of the subject, as an image of any mode."""
    path.parent.mkdir(exist_ok=True)
    image = Image.new(mode, SIZE, outside)
    image.paste(inside, box)
    image.save(path)


def share_of(folder, **kwargs) -> float:
    (found,) = read_photos(folder, None, **kwargs)
    assert found.mask is not None
    expected = np.zeros(SIZE[::-1], bool)
    expected[3:9, 4:12] = True
    return (found.mask & expected).sum() / (found.mask | expected).sum()


@pytest.mark.parametrize(
    ("mode", "outside", "inside"),
    [
        ("L", 0, 255),
        ("RGB", (0, 0, 0), (255, 255, 255)),
        ("RGB", (0, 0, 0), (200, 200, 200)),
        ("1", 0, 1),
        ("RGBA", (0, 0, 0, 0), (40, 10, 10, 255)),  # a cutout of a dark subject
        ("RGBA", (255, 255, 255, 0), (255, 255, 255, 255)),  # white, whose opacity is the shape
        ("RGBA", (90, 90, 90, 20), (10, 10, 10, 230)),
        ("LA", (255, 0), (255, 255)),
        ("LA", (0, 0), (30, 255)),
        ("RGBA", (0, 0, 0, 255), (255, 255, 255, 255)),  # opaque: by brightness
        ("RGBA", (0, 0, 0, 252), (255, 255, 255, 255)),
        ("LA", (0, 255), (255, 255)),
    ],
)
def test_what_a_mask_says(tmp_path, mode, outside, inside):
    photo(tmp_path / "a.png")
    mask(tmp_path / "masks" / "a.png", mode, outside, inside)
    assert share_of(tmp_path) == 1


def test_a_mask_of_a_palette(tmp_path):
    photo(tmp_path / "a.png")
    image = Image.new("P", SIZE, 0)
    image.putpalette([9, 9, 9, 30, 0, 0])
    image.paste(1, SUBJECT)
    (tmp_path / "masks").mkdir()
    image.save(tmp_path / "masks" / "a.png", transparency=0)
    assert share_of(tmp_path) == 1


@pytest.mark.parametrize("name", ["masks", "Masks", "MASKS", "mask", "Mask"])
def test_folders_of_masks(tmp_path, name):
    photo(tmp_path / "a.JPG")
    mask(tmp_path / name / "a.PNG")
    assert share_of(tmp_path) == 1


def test_two_folders_of_masks(tmp_path):
    photo(tmp_path / "a.png")
    mask(tmp_path / "masks" / "a.png")
    mask(tmp_path / "mask" / "a.png")
    with pytest.raises(UserError, match=r"mask, .*masks: two folders of masks; expected one"):
        find_photos(tmp_path)
    assert share_of(tmp_path, masks_dir=tmp_path / "mask") == 1


@pytest.mark.parametrize(
    "name",
    [
        "a-masklabel", "a_mask", "a.mask", "a-mask", "a-MASK", "a-condlabel", "A_mask", "mask_a", "mask-A", "a mask",
        "a (mask)", "a_mask_1", "a_mask0", "a_masks", "a_matte", "a_alpha", "a_seg", "a.jpg.mask", "a.jpg_mask",
    ],
)  # fmt: skip
@pytest.mark.parametrize("folder", ["", "masks"])
def test_masks_that_are_named_after_their_photo(tmp_path, name, folder):
    photo(tmp_path / "a.jpg")
    mask(tmp_path / folder / f"{name}.png")
    assert share_of(tmp_path) == 1
    assert photo_count(tmp_path) == 1


def test_a_photo_of_a_mask_is_a_photo(tmp_path, caplog):
    """Unless the photo that it would mask is there; OneTrainer's ending always tells a mask."""
    photo(tmp_path / "halloween-mask.png")
    photo(tmp_path / "mask.png")
    assert [found.name for found in find_photos(tmp_path)] == ["halloween-mask", "mask"]
    mask(tmp_path / "gone-masklabel.png")
    assert [found.mask for found in find_photos(tmp_path)] == [None, None]
    assert "masks of no photo are not used: gone-masklabel.png" in caplog.text
    mask(tmp_path / "mask-masklabel.png")
    with pytest.raises(UserError, match=r"halloween-mask\.png: no mask named halloween-mask\.\*"):
        find_photos(tmp_path)


@pytest.mark.parametrize(("first", "second"), [("masks/a.jpg", "masks/a.png"), ("masks/a.png", "a-masklabel.png")])
def test_two_masks_of_one_photo(tmp_path, first, second):
    photo(tmp_path / "a.png")
    for name in (first, second):
        mask(tmp_path / name)
    with pytest.raises(UserError, match="two masks of the photo a; expected one") as error:
        find_photos(tmp_path)
    assert all(str(tmp_path / name) in str(error.value) for name in (first, second))


@pytest.mark.parametrize(("of_photo", "of_mask"), [(COMPOSED, TAKEN_APART), (TAKEN_APART, COMPOSED)])
def test_accents_of_both_kinds_meet(tmp_path, of_photo, of_mask):
    photo(tmp_path / f"caf{of_photo}.png")
    mask(tmp_path / "masks" / f"caf{of_mask}.png")
    assert share_of(tmp_path) == 1
    (found,) = find_photos(tmp_path)
    assert found.name == f"caf{COMPOSED}"


def test_a_name_that_is_no_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    photo(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", path)
    (found,) = read_photos(tmp_path, None)
    assert found.name == r"caf\xe9"


def test_masks_that_say_nothing(tmp_path, caplog):
    for name, box in (("full", (0, 0, *SIZE)), ("none", (0, 0, 0, 0)), ("part", SUBJECT)):
        photo(tmp_path / f"{name}.png")
        mask(tmp_path / "masks" / f"{name}.png", box=box)
    mask(tmp_path / "masks" / "other.png")
    photos = read_photos(tmp_path, None)
    assert f"{tmp_path}: these masks cover all of their photos, so they say nothing; correct them: full" in caplog.text
    assert "these masks cover nothing, as no subject in them is bright or opaque; correct them: none" in caplog.text
    assert f"{tmp_path / 'masks'}: masks of no photo are not used: other.png" in caplog.text
    assert describe_masks(photos) == [
        "mask of full: masks/full.png, covers 100.0%",
        "mask of none: masks/none.png, covers 0.0%",
        "mask of part: masks/part.png, covers 25.0%",
    ]


@pytest.mark.parametrize(
    "others",
    [
        ["IMG_1.MOV"],
        ["IMG_1.tags", "IMG_1.JPG.json", "IMG_1.xmp", "IMG_1.aae"],
        ["IMG_1.HEIC", "IMG_1.dng", "img_1.mp4", "IMG_1.gif"],
        ["notes.txt", "metadata.jsonl", "IMG_1.JPG.supplemental-metadata", "IMG_1"],
    ],
)
def test_files_beside_photos_are_named_in_one_warning(tmp_path, caplog, others):
    photo(tmp_path / "IMG_1.JPG")
    for name in others:
        (tmp_path / name).write_text("x")
    assert [found.name for found in read_photos(tmp_path, None)] == ["IMG_1"]
    assert photo_count(tmp_path) == 1
    (record,) = caplog.records
    assert record.getMessage() == f"{tmp_path}: files that are no photos are not used: {', '.join(sorted(others))}"


@pytest.mark.parametrize("name", ["b.png", "b.heic", "b.gif", "b"])
def test_a_file_that_may_be_a_photo_is_refused(tmp_path, name):
    photo(tmp_path / "a.png")
    (tmp_path / name).write_text("no picture")
    with pytest.raises(UserError, match=f"{name}: not a JPEG, PNG, WEBP, HEIC or AVIF image; remove or convert it"):
        read_photos(tmp_path, None)


def test_a_folder_without_photos_names_what_it_has(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"0 photos, and other files: a\.txt; expected 1 to 100"):
        find_photos(tmp_path)
    assert photo_count(tmp_path) == photo_count(tmp_path / "nowhere") == 0


@pytest.mark.parametrize("folder", ["", "masks"])
@pytest.mark.parametrize("name", ["b.png", "b.txt", "b"])
def test_a_link_to_nothing_is_named(tmp_path, folder, name):
    photo(tmp_path / "a.png")
    mask(tmp_path / "masks" / "a.png")
    (tmp_path / folder / name).symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=rf"{name}: cannot be read \(No such file.*; if it is a link, restore what"):
        find_photos(tmp_path)


def test_links_that_work(tmp_path):
    photo(tmp_path / "else" / "b.png")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").symlink_to(tmp_path / "else" / "b.png")
    assert [found.name for found in read_photos(tmp_path / "photos", None)] == ["a"]
    (tmp_path / "photos" / "c.png").symlink_to("c.png")
    with pytest.raises(UserError, match=r"c\.png: cannot be read \(Too many levels of symbolic links\)"):
        find_photos(tmp_path / "photos")


def test_what_is_no_file(tmp_path):
    photo(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    assert len(find_photos(tmp_path)) == 1
    os.mkfifo(tmp_path / "c.png")
    with pytest.raises(UserError, match=r"c\.png: not a regular file"):
        find_photos(tmp_path)
    (tmp_path / "c.png").unlink()
    (tmp_path / "c.png").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"c\.png: not a regular file"):
        find_photos(tmp_path)


def test_home_is_expanded(tmp_path, monkeypatch):
    photo(tmp_path / "mine" / "a.png")
    mask(tmp_path / "outlines" / "a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(find_photos("~/mine", "~/outlines")) == 1
    assert photo_count("~/mine") == 1
    for name in ("~nosuchuser/a", "a\0b", "\udc80"):
        with pytest.raises(UserError):
            find_photos(name)
        assert photo_count(name) == 0


def test_names_cannot_forge_lines(tmp_path, caplog):
    photo(tmp_path / "a\nb\x1b[2J.png")
    (tmp_path / "c\n.txt").write_text("x")
    mask(tmp_path / "masks" / "a\nb\x1b[2J.png", box=(0, 0, 0, 0))
    lines = describe_masks(read_photos(tmp_path, None))
    assert not any(character in "".join([*lines, caplog.messages[0]]) for character in "\n\x1b")


def test_ten_thousand_files_are_sorted_in_a_moment(tmp_path, monkeypatch):
    paths = [tmp_path / f"{i}{ending}" for i in range(10_000) for ending in (".png", ".txt", "-masklabel.png")]
    monkeypatch.setattr(photo_folder, "list_files", lambda _: paths)
    before = time.process_time()
    files = photo_folder.split_folder(tmp_path)
    assert [len(part) for part in files] == [10_000, 10_000, 10_000, 0]
    assert time.process_time() - before < 5


@pytest.mark.parametrize("name", ["a.jpg", "A"])
def test_names_of_masks_in_their_folder(tmp_path, name):
    """The photo's whole name, as COLMAP has it, and another case."""
    photo(tmp_path / "a.jpg")
    mask(tmp_path / "masks" / f"{name}.png")
    assert share_of(tmp_path) == 1


def test_the_photos_are_not_their_own_masks(tmp_path):
    photo(tmp_path / "a.png")
    with pytest.raises(UserError, match="the folder of the photos themselves"):
        find_photos(tmp_path, masks_dir=tmp_path / ".")


@pytest.mark.parametrize("name", ["a.jpg:Zone.Identifier", "ehthumbs.db", "Icon\r", "ZbThumbnail.info"])
def test_what_systems_leave_in_folders(tmp_path, name, caplog):
    photo(tmp_path / "a.jpg")
    (tmp_path / name).write_bytes(b"x")
    assert photo_count(tmp_path) == 1
    assert caplog.messages == []
