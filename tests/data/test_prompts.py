"""Templates and what fills them; concept.json as people save it."""

import pytest

from catversion_jax.config import Config
from catversion_jax.data.concept_sets import ConceptFolder, find_concepts
from catversion_jax.data.prompts import fill
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import BOM
from catversion_jax.utils.settings import check_settings


@pytest.mark.parametrize(
    ("template", "class_word", "article", "message"),
    [
        ("a photo of {thing}", "mug", "a", "prompt template 'a photo of {thing}': the only fields are"),
        ("a photo of {concept", "mug", "a", "prompt template"),
        ("a photo of {concept}", "mug}", "a", "class word 'mug}': has a brace or a parenthesis; expected words alone"),
        (
            "a photo of {concept}",
            "mug (blue)",
            "a",
            "class word 'mug (blue)': has a brace or a parenthesis; expected words alone",
        ),
        ("a photo of {concept}", "{concept}", "a", "class word '{concept}': has a brace"),
        ("a photo of {concept}", "mug", "{class_word}", "article '{class_word}': has a brace"),
    ],
)
def test_the_brace_is_blamed_where_it_is(template, class_word, article, message):
    with pytest.raises(UserError) as error:
        fill(template, class_word, article)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("key", ["class_word", "article", "identifier"])
def test_braces_are_refused_before_a_model_is_read(key):
    config = Config().replaced({"run_dir": "r", "data.dir": "a", "concept.class_word": "mug"})
    check_settings(config)
    with pytest.raises(UserError, match=rf"config\.concept\.{key}='a {{b': expected .*, without braces"):
        check_settings(config.replaced({f"concept.{key}": "a {b"}))


def test_a_concept_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "concept.json").write_bytes(BOM + b'{"class_word": "mug", "article": ""}')
    (folder,) = find_concepts(tmp_path)
    assert folder.prompts(["{concept}"]) == ("a mug",)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b'{"class_word": "mug"}', b'{"class_word": 1, "article": "a"}', b"[" * 100_000, b"\xff\xfe{",
        b'{"class_word": " ", "article": "a"}', b'{"class_word": "mug", "article": "a", "more": "b"}', b"null",
        b'{"class_word": "' + b"x" * 50_000 + b'"}',
    ],
)  # fmt: skip
def test_what_is_no_concept(tmp_path, data):
    (tmp_path / "concept.json").write_bytes(data)
    with pytest.raises(UserError, match=r"concept\.json: ") as error:
        _ = ConceptFolder(tmp_path).class_word
    assert 'as {"class_word": "teapot", "article": "a"}' in str(error.value)
    assert len(str(error.value)) < 2000
