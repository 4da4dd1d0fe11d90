"""The base model that concepts are used with: the one they were trained on, or one with the same text encoder."""

from collections.abc import Callable, Mapping, Sequence

from catversion_jax.base.pipeline import MINI, BasePipeline, ModelConfig, load_pipeline
from catversion_jax.base.prompt_tokens import prompts_without, read_prompt
from catversion_jax.base.sampler_config import SamplerConfig
from catversion_jax.methods import concept_file
from catversion_jax.methods.concept_file import Concept
from catversion_jax.methods.model_names import is_on_hub
from catversion_jax.utils.errors import UserError, listed
from catversion_jax.utils.paths import expand
from catversion_jax.weights import hub


def model_of(concepts: Mapping[str, Concept], path: str = "", dtype: str = ModelConfig.dtype) -> ModelConfig:
    """The model at `path` or, without a path, the one that the first concept was trained on that records one.

    Raises UserError if that is not here: a concept may come from a stranger, and what it names is not downloaded.
    """
    # An embedding of another program knows nothing of its model.
    knowing = {source: concept for source, concept in concepts.items() if concept.fingerprint or concept.model_path}
    (source, first), *_ = (knowing or concepts).items()
    if path:
        return ModelConfig(path, dtype=dtype)
    recorded = first.model_path
    if recorded and not expand(recorded).exists():
        if not is_on_hub(recorded):
            raise UserError(f"{source}: learned on {recorded!r}, a local model; give its path as --model")
        if not hub.is_cached(recorded, first.model_revision):
            raise UserError(
                f"{source}: learned on {recorded} of {hub.endpoint()}, which is not in the cache; "
                f"to download it, say --model={recorded}"
            )
    return ModelConfig(recorded, first.model_revision, first.model_variant, first.model_prediction_type, dtype)


def load_for_concepts(
    concepts: Mapping[str, Concept], model: ModelConfig, load: Callable[[ModelConfig], BasePipeline] = load_pipeline
) -> tuple[BasePipeline, list[str]]:
    """Loads a base model for concepts, given by their sources; returns it with warnings.

    Raises UserError if a concept was trained in another text encoder or does not fit the model's networks.
    """
    pipeline = load(model)
    name = model.path or str(MINI)
    warnings = [
        line
        for source, concept in concepts.items()
        for line in concept_file.check_model(concept, pipeline.fingerprint, pipeline.networks, source, name)
    ]
    return pipeline, warnings


def warnings(pipeline: BasePipeline, prompts: Sequence[str], concepts: Sequence[Concept]) -> list[str]:
    """Returns one warning for each likely mistake: a strength of 0, no class word in a prompt."""
    lines = []
    idle = [concept for concept in concepts if not concept.strength]
    if len(idle) == len(concepts):
        lines.append("strength=0 removes the concept: what follows is the base model's")
    elif idle:
        lines.append(f"strength=0 removes the concept of {idle[0].class_word!r}")
    concepts = [concept for concept in concepts if concept.strength] or concepts
    named = [concept for concept in concepts if concept.class_word]
    words = [concept.class_word for concept in named]
    for concept, without in zip(named, prompts_without(pipeline.tokenizers, words, prompts), strict=True):
        word, vectors = concept.class_word, concept.method.vectors
        # Beside others, its place in the image is found by the tokens of its word.
        alone = vectors and len(named) == 1
        missing = [p for p in prompts if not has_vectors(pipeline, p, word, vectors)] if alone else without
        said = f"the class word {word!r}, which the concept was learned with"
        lines += [f"without {said}: {listed(map(repr, missing))}"] if missing else []
    return lines


def has_vectors(pipeline: BasePipeline, prompt: str, word: str, vectors: int) -> bool:
    """Whether an embedding's vectors have a place in a prompt."""
    return bool((read_prompt(pipeline.tokenizer, prompt, word, vectors=vectors).vector >= 0).any())


def recorded_sampler(concepts: Mapping[str, Concept]) -> SamplerConfig:
    """Returns the sampler's settings that the concepts record, or the defaults if none of them does.

    Raises UserError if they differ.
    """
    found = {source: concept.sampler for source, concept in concepts.items() if concept.sampler}
    if not found:
        return SamplerConfig()
    (first, sampler), *others = found.items()
    for source, other in others:
        if other != sampler:
            raise UserError(
                f"{first}, {source}: made to be sampled in different ways ({described(sampler)}; {described(other)}); "
                "choose scheduler, steps and guidance"
            )
    return sampler


def described(sampler: SamplerConfig) -> str:
    return ", ".join(f"{name} {getattr(sampler, name)!r}" for name in concept_file.SAMPLER)
