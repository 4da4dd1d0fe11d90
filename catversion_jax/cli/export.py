"""`catversion export`: writes a concept for PyTorch pipelines and ComfyUI."""

from absl import flags

from catversion_jax.cli.flags import (
    define_embedding,
    define_model,
    define_prompts,
    define_strength,
    given_concepts,
    given_prompts,
    given_strength,
    make_out,
)
from catversion_jax.methods.concept_model import load_for_concepts, model_of, warnings
from catversion_jax.sampling.export import EMBEDS, FOLDERS, check_exportable, write_concepts, write_embeds
from catversion_jax.sampling.sampler import SampleRequest
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.log import warn
from catversion_jax.utils.paths import expand


def define_flags() -> None:
    define_embedding(several=True)
    flags.DEFINE_string("out", None, "Folder for the export; files of an earlier one are replaced; required.")
    define_prompts(f"Prompt whose text states are written to {EMBEDS}; may be repeated.")
    flags.DEFINE_string(
        "negative_prompt", "", "Negative prompt that is written beside each prompt; never sees the concept."
    )
    define_strength()
    define_model()


def main(arguments: flags.FlagValues) -> int:
    """Writes concepts, the code that uses them and, if prompts are given, their text states with the one concept."""
    if not arguments.out:
        raise UserError("--out: missing; expected the folder to write")
    strength = given_strength(arguments)
    concepts = {source: concept.at(strength) for source, concept in given_concepts(arguments).items()}
    for source, concept in concepts.items():
        check_exportable(concept, source)
    wanted = arguments.prompt or arguments.prompts_file
    prompts = given_prompts(arguments) if wanted else []
    if prompts and len(concepts) > 1:
        raise UserError(f"--prompt: text states hold one concept, not {len(concepts)}; export each by itself")
    if not all(concept.strength for concept in concepts.values()):
        warn("strength=0: the exported concept does nothing until another strength is set")
    out = make_out(expand(arguments.out))
    written = []
    if prompts:
        model = model_of(concepts, arguments.model or "")
        pipeline, unsure = load_for_concepts(concepts, model)
        (concept,) = concepts.values()
        for warning in unsure + warnings(pipeline, prompts, [concept]):
            warn(warning)
        request = SampleRequest(tuple(prompts), (), negative_prompt=arguments.negative_prompt)
        write_embeds(out / EMBEDS, pipeline, request, concept, model.path)
        written.append(EMBEDS)
    for folder in FOLDERS:
        make_out(out / folder)
    written += write_concepts(out, list(concepts.values()))
    print(f"{', '.join(written)}, catversion_torch.py and ComfyUI/ in {out}")
    return 0
