"""What a concept is called in prompts, and the templates of its prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

from catversion_jax.utils.errors import UserError
from catversion_jax.utils.settings import Constraint, is_plain, setting, several_texts

BRACES = frozenset("{}")
PARENTHESES = frozenset("()")


def words(what: str) -> Constraint:
    """A text that is not blank and has no braces, which are for a template's fields."""
    return Constraint(
        lambda value: is_plain(value) and bool(value.strip()) and not (BRACES | PARENTHESES) & set(value),
        f"{what}, without braces and control characters",
    )


@dataclass(frozen=True)
class ConceptConfig:
    """What the concept is called in prompts."""

    class_word: str = setting(
        "",
        "Base class of the concept, as you would name it in a prompt; train requires it.",
        words("the base class, such as teapot"),
    )
    article: str = setting(
        "",
        'Article before the class word; "" means a or an, by the first letter.',
        Constraint(
            lambda value: is_plain(value) and not (BRACES | PARENTHESES) & set(value),
            "an article, such as a or the, without braces",
        ),
    )
    templates: tuple[str, ...] = setting(
        ("a photo of {concept}",),
        "Prompt templates for training; {concept} is article and class word, {class_word} the word alone.",
        several_texts("prompt"),
    )
    identifier: str = setting(
        "sks",
        "Word that dreambooth and custom_diffusion put before the class word.",
        words("a word, such as sks"),
    )

    def prompts(self, templates: Sequence[str]) -> list[str]:
        """The templates, filled in for this concept."""
        return [fill(template, self.class_word, self.article or article(self.class_word)) for template in templates]


def article(class_word: str) -> str:
    """The indefinite article, chosen by the first letter."""
    return "an" if class_word[:1].lower() in "aeiou" else "a"


def fill(template: str, class_word: str, article: str) -> str:
    """Fills a template: {concept} becomes article and class word, {class_word} the class word alone.

    Raises UserError for any other field, and for a brace in the class word or the article, or a parenthesis, which
    would be a weight in the prompts of pictures.
    """
    for what, text in (("class word", class_word), ("article", article)):
        if (BRACES | PARENTHESES) & set(text):
            raise UserError(f"{what} {text!r}: has a brace or a parenthesis; expected words alone, such as teapot")
    prompt = template.replace("{concept}", f"{article} {class_word}").replace("{class_word}", class_word)
    if BRACES & set(prompt):
        raise UserError(f"prompt template {template!r}: the only fields are {{concept}} and {{class_word}}")
    return prompt
