"""What the commands show of many pictures: a grid that stays small, and which mask is whose."""

import numpy as np
from PIL import Image

from catversion_jax.base.pipeline import ModelConfig
from catversion_jax.base.sampler_config import SamplerConfig
from catversion_jax.cli import generate, train
from catversion_jax.data.photos import read_photos
from catversion_jax.sampling.picture_record import PictureRecord, records_of
from catversion_jax.sampling.sampler import SampleRequest
from catversion_jax.utils.image_grid import reduced


def pictures_of(pipeline, prompts: int, seeds: int) -> list[PictureRecord]:
    request = SampleRequest.every([f"prompt {i}" for i in range(prompts)], range(seeds), SamplerConfig())
    return list(records_of(request, pipeline, ModelConfig(), [[]] * len(request.prompts)))


def test_the_grid_keeps_small_copies_of_the_first_pictures(tiny_pipeline, tmp_path, monkeypatch):
    """Of hundreds, every one is written and 256 are kept, however large they are."""
    monkeypatch.setattr(generate, "save_picture", lambda path, *_: written.append(path.name))
    written: list[str] = []
    image = np.zeros((512, 256, 3), np.uint8)
    rows = generate.write_images(tmp_path, pictures_of(tiny_pipeline, 20, 20), iter([image] * 400))
    assert len(set(written)) == 400
    assert [len(row) for row in rows.values()] == [20] * 12 + [16]
    assert {picture.shape for row in rows.values() for picture in row} == {(256, 128, 3)}
    grid = generate.wrapped_grid(rows)
    assert max(grid.size) < 13_000
    assert grid.width * grid.height < 30 * 10**6


def test_few_pictures_are_all_in_the_grid(tiny_pipeline, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)
    rows = generate.write_images(tmp_path, pictures_of(tiny_pipeline, 2, 3), iter(images))
    np.testing.assert_array_equal([picture for row in rows.values() for picture in row], images)
    assert len(list(tmp_path.glob("prompt-[01]_*_[012].png"))) == 6


def test_reduced():
    small = np.zeros((256, 100, 3), np.uint8)
    assert reduced(small, 256) is small
    assert reduced(np.zeros((1, 20_000, 3), np.uint8), 256).shape == (1, 256, 3)


def test_train_prints_which_mask_is_whose(tmp_path, capsys):
    (tmp_path / "masks").mkdir()
    for name, ending in (("a", "png"), ("b", "webp")):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.jpg")
        mask = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
        mask.paste((9, 9, 9, 255), (0, 0, 8, 2 if name == "a" else 6))
        mask.save(tmp_path / "masks" / f"{name}.{ending}", lossless=True)
    train.print_photos(read_photos(tmp_path, None))
    assert capsys.readouterr().out.splitlines() == [
        "photos:   2, 2 with masks",
        "mask of a: masks/a.png, covers 25.0%",
        "mask of b: masks/b.webp, covers 75.0%",
    ]
    train.print_photos(read_photos(tmp_path / "masks", None))
    assert capsys.readouterr().out == "photos:   2\n"
