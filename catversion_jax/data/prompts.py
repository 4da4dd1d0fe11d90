"""Prompt templates: what the base class of a concept is called, and the prompts that name it."""

from collections.abc import Sequence
from dataclasses import dataclass

from catversion_jax.utils.errors import UserError
from catversion_jax.utils.settings import ANY_TEXT, setting, several, text


@dataclass(frozen=True)
class ConceptConfig:
    """What the concept is called in prompts."""

    class_word: str = setting(
        "", "the base class, as you would name it in a prompt; required", text("the base class, such as teapot")
    )
    article: str = setting("", '"": a or an, by the class word\'s first letter', ANY_TEXT)
    templates: tuple[str, ...] = setting(
        ("a photo of {concept}",), "training prompts; {concept} is article and class word", several("prompt")
    )
    identifier: str = setting(
        "sks",
        "of dreambooth and custom_diffusion: the word put before the class word",
        text("a word, such as sks"),
    )

    def prompts(self, templates: Sequence[str]) -> list[str]:
        """The templates with this concept in them."""
        return [fill(template, self.class_word, self.article or article(self.class_word)) for template in templates]


def article(class_word: str) -> str:
    """The indefinite article, by the first letter."""
    return "an" if class_word[:1].lower() in "aeiou" else "a"


def fill(template: str, class_word: str, article: str) -> str:
    """The prompt of a template: {concept} becomes article and class word, {class_word} the word alone.

    Raises UserError for any other field."""
    prompt = template.replace("{concept}", f"{article} {class_word}").replace("{class_word}", class_word)
    if "{" in prompt or "}" in prompt:
        raise UserError(f"prompt template {template!r}: the only fields are {{concept}} and {{class_word}}")
    return prompt
