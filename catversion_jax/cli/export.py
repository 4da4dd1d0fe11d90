"""`catversion export`: writes a concept for PyTorch pipelines and ComfyUI."""

from absl import flags

from catversion_jax.cli.flags import (
    define_embedding,
    define_model,
    define_prompts,
    define_strength,
    given_concepts,
    given_embedding,
    given_prompts,
    given_strength,
    make_out,
)
from catversion_jax.methods.concept_model import load_for_concepts, model_of, warnings
from catversion_jax.sampling.export import COMFYUI, EMBEDS, check_exportable, write_concept, write_embeds
from catversion_jax.sampling.sampler import SampleRequest
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.log import warn
from catversion_jax.utils.paths import expand


def define_flags() -> None:
    define_embedding()
    flags.DEFINE_string("out", None, "Folder for the export; files of an earlier one are replaced; required.")
    define_prompts(f"Prompt whose text states are written to {EMBEDS}; may be repeated.")
    flags.DEFINE_string(
        "negative_prompt", "", "Negative prompt that is written beside each prompt; never sees the concept."
    )
    define_strength()
    define_model()


def main(arguments: flags.FlagValues) -> int:
    """Writes the concept, the code that uses it and, if prompts are given, their text states."""
    given_embedding(arguments)  # one concept alone
    concepts = given_concepts(arguments)
    if not arguments.out:
        raise UserError("--out: missing; expected the folder to write")
    ((source, concept),) = concepts.items()
    check_exportable(concept, source)
    concept = concept.at(given_strength(arguments))
    wanted = arguments.prompt or arguments.prompts_file
    prompts = given_prompts(arguments) if wanted else []
    if not concept.strength:
        warn("strength=0: the exported concept does nothing until another strength is set")
    out = make_out(expand(arguments.out))
    written = []
    if prompts:
        model = model_of(concepts, arguments.model or "")
        pipeline, unsure = load_for_concepts(concepts, model)
        for warning in unsure + warnings(pipeline, prompts, [concept]):
            warn(warning)
        request = SampleRequest(tuple(prompts), (), negative_prompt=arguments.negative_prompt)
        write_embeds(out / EMBEDS, pipeline, request, concept, model.path)
        written.append(EMBEDS)
    make_out(out / COMFYUI)
    written += write_concept(out, concept)
    print(f"{', '.join(written)} in {out}")
    return 0
