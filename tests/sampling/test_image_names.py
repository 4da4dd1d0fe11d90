"""File names of images: short enough for any file system, and one for each prompt."""

import pytest

from catversion_jax.sampling.image_names import NAMED, slug, unique_slugs


@pytest.mark.parametrize(
    "prompt", ["a teapot", "茶" * 300, "🫖 " * 200, "é" * 120, "a" * 4000, "!?", "", "a/../b", "..", "-"]
)
def test_a_file_name(tmp_path, prompt):
    name = f"{slug(prompt)}_{2**32 - 1}.png"
    (tmp_path / name).write_bytes(b"")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert NAMED.fullmatch(name.removesuffix(".png"))


def test_one_for_each_prompt():
    prompts = ["a teapot", "a teapot!", "a Teapot", "茶" * 300, "茶" * 301, *(f"a {'very ' * 40}{i}" for i in range(5))]
    slugs = unique_slugs(prompts)
    assert len(set(slugs)) == len(prompts)
    assert max(len(name.encode()) for name in slugs) <= 220
