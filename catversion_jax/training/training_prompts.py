"""The prompts that a concept is trained with: the templates of its config, and the captions of its photos."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from catversion_jax.base.pipeline import BasePipeline
from catversion_jax.base.tokenizer import Tokenizer
from catversion_jax.base.words import find_word, without_word
from catversion_jax.config import Config
from catversion_jax.data.photos import Photo
from catversion_jax.methods.base import Method
from catversion_jax.utils.errors import UserError, listed
from catversion_jax.utils.log import warn
from catversion_jax.utils.types import Int


class TrainingPrompts(NamedTuple):
    """The prompts of a concept. Those of each photo are `prompt_count` of them from `first_prompt` on."""

    texts: list[str]
    first_prompt: Int[np.ndarray, "N"]
    prompt_count: Int[np.ndarray, "N"]


def training_prompts(
    config: Config, method: Method, pipeline: BasePipeline, photos: Sequence[Photo]
) -> TrainingPrompts:
    """Returns the templates' prompts and, behind them, those of the captions; a photo without one has the templates'.

    A caption that a text encoder takes without the class word would teach nothing of the concept: it is left out.
    """
    texts = config.concept.prompts(config.concept.templates)
    first, count = np.zeros(len(photos), np.int32), np.full(len(photos), len(texts), np.int32)
    for index, prompt in filled_captions(config, photos).items():
        if holds_concept(config, method, pipeline, prompt):
            first[index], count[index] = len(texts), 1
            texts.append(prompt)
    return TrainingPrompts(texts, first, count)


def holds_concept(config: Config, method: Method, pipeline: BasePipeline, prompt: str) -> bool:
    """Whether every text encoder finds a prompt's class word, with the method's identifier before it if it has one."""
    word = config.concept.class_word
    return all(
        find_word(tokenizer, prompt_tokens(method, tokenizer, [prompt], word), method.word(word))[0] >= 0
        for tokenizer in pipeline.tokenizers
    )


def filled_captions(config: Config, photos: Sequence[Photo]) -> dict[int, str]:
    """Returns the captions of photos by the photo's index, filled in as templates are."""
    filled = {}
    for index, photo in enumerate(photos):
        if photo.caption:
            try:
                (filled[index],) = config.concept.prompts([photo.caption])
            except UserError as error:
                raise UserError(f"caption of the photo {photo.name}: {error}") from error
    return filled


def check_prompts(config: Config, method: Method, pipeline: BasePipeline, photos: Sequence[Photo]) -> None:
    """Raises UserError if nothing could be learned, as no training prompt has a place where the concept enters.

    Warns of the prompts that have none, or that lack the class word, and of captions that are left out.
    """
    captions = filled_captions(config, photos)
    if unused := [photos[i].name for i, text in captions.items() if not holds_concept(config, method, pipeline, text)]:
        warn(
            f"captions of {listed(unused)} are not used, as they do not hold {config.concept.class_word!r} within the "
            "text encoder's length; write {concept} where the subject is named"
        )
    if cut := [text for text in captions.values() if is_cut(pipeline.tokenizer, text)]:
        warn(f"captions are too long: {told_prompts(pipeline.tokenizer, cut)}")
    check_templates(config, method, pipeline)


def check_templates(config: Config, method: Method, pipeline: BasePipeline) -> None:
    """Raises UserError if no prompt of the templates has a place where the concept enters; warns of some without it."""
    word = config.concept.class_word
    prompts = config.concept.prompts(config.concept.templates)
    where = method.word(word)
    warned: set[str] = set()
    for tokenizer in pipeline.tokenizers:
        last = find_word(tokenizer, prompt_tokens(method, tokenizer, prompts, word), where)
        # The methods with an identifier change the UNet for all prompts, but what they learn is called by it.
        entered = last >= 0 if method.identifier else np.any(method.token_mask(last, tokenizer.length), (1, 2))
        idle = [prompt for prompt, enters in zip(prompts, entered, strict=True) if not enters]
        if len(idle) == len(prompts):
            check_length(tokenizer, where)
            raise UserError(
                f"config.concept.templates: nothing would be learned, as the prompts ({told_prompts(tokenizer, idle)}) "
                f"have no place for the concept: they do not hold {where!r}; write {{concept}} near their beginning"
            )
        lacked = {where: idle, word: without_word([tokenizer], word, prompts)}
        if found := [(what, those) for what, those in lacked.items() if those and not warned & set(those)]:
            what, those = found[0]
            warn(f"training prompts without {what!r}: {told_prompts(tokenizer, those)}")
            warned |= set(those)


def check_length(tokenizer: Tokenizer, word: str) -> None:
    """Raises UserError if a word alone is too long for the text encoder, so that no prompt could hold it."""
    size, most = len(tokenizer.word(word)), tokenizer.length - 2
    if size > most:
        raise UserError(
            f"{word!r:.60}: {size} tokens; expected a class word or identifier of at most {most}; shorten it"
        )


def prompt_tokens(
    method: Method, tokenizer: Tokenizer, prompts: Sequence[str], class_word: str
) -> Int[np.ndarray, "T Q"]:
    """Returns the tokens of prompts as a text encoder is given them, with the method's identifier if it has one."""
    return tokenizer.fit([method.prompt_ids(tokenizer, tokenizer.word(prompt), class_word) for prompt in prompts])


def told_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> str:
    """Names prompts, and says which of them are cut off at the text encoder's length."""
    cut = f", cut off after {tokenizer.length} tokens"
    return listed(f"{p!r:.100}{cut if is_cut(tokenizer, p) else ''}" for p in dict.fromkeys(prompts))


def is_cut(tokenizer: Tokenizer, prompt: str) -> bool:
    """Whether a prompt has more tokens than a text encoder takes between its start and end tokens."""
    return len(tokenizer.word(prompt)) > tokenizer.length - 2
