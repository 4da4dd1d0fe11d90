"""Concepts on Hugging Face, or on the server that HF_ENDPOINT names: one model repository each, with a model card."""

import tempfile
from pathlib import Path

from catversion_jax.methods import concept_file
from catversion_jax.methods.concept_file import PREVIEW, Concept
from catversion_jax.utils.errors import UserError, short
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.paths import AnyPath
from catversion_jax.weights import hub

CARD = """---
tags:
- text-to-image
- catversion
- personalization
{base_model}---

# A {class_word}, learned by {method}

`concept.safetensors` makes prompts with the word **{class_word}** show one particular {class_word}. It was learned by
[catversion_jax](https://arxiv.org/abs/2311.14631) on {model}, in whose text encoder (fingerprint `{fingerprint}`) it
works.
{picture}
```console
$ catversion generate --embedding={repo} --prompt="a photo of a {class_word} on the beach"
```

```python
import catversion_jax as cv

pipe = cv.Pipeline.from_pretrained({model_name!r})
concept = cv.Concept.from_pretrained("{repo}")
images = pipe("a photo of a {class_word} on the beach", concepts=[concept])
```

In diffusers and ComfyUI: `catversion export --embedding={repo} --out=exported` writes the code that loads it there.

| setting | value |
|---|---|
| method | {method} |
| steps, learning rate, seed | {steps}, {learning_rate:g}, {seed} |
| training prompts | {templates} |
| strength | {strength:g} |
| sampler | {sampler} |
"""


def push(concept: Concept, repo: str, preview: AnyPath | None = None, private: bool = False) -> str:
    """Uploads a concept with its model card and, if there is one, a picture; returns the address of its page.

    The repository is made unless it is there. What is uploaded holds no path of this machine: a local base model goes
    by its last part. Raises UserError, naming the repository, if that fails.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        concept.save(folder / concept_file.FILE_NAME)
        if preview is not None and preview.is_file():
            (folder / PREVIEW).write_bytes(preview.read_bytes())
        card = card_of(concept, repo, has_picture=(folder / PREVIEW).exists())
        write_atomically(folder / "README.md", lambda path: path.write_text(card))
        api = HfApi(endpoint=hub.endpoint())
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"A {concept.class_word} by CatVersion")
        except Exception as error:  # of requests, httpx or the hub, depending on the library's version
            todo = "log in (`hf auth login`) or set HF_TOKEN, with the right to write there"
            raise UserError(f"{repo}: not uploaded to {hub.endpoint()} ({short(error)}); {todo}") from error
    return f"{hub.endpoint()}/{repo}"


def card_of(concept: Concept, repo: str, has_picture: bool) -> str:
    """Returns the model card."""
    said = concept.metadata()
    model = said["model_path"]
    sampler = said.get("sampler") or {}
    return CARD.format(
        base_model=f"base_model: {model}\n" if "/" in model else "",
        class_word=concept.class_word,
        method=concept.method_name,
        model=f"`{model}`" if model else "the mini model of that package",
        model_name=model,
        fingerprint=concept.fingerprint,
        picture=f"\n![Images of it]({PREVIEW})\n" if has_picture else "",
        repo=repo,
        steps=concept.steps,
        learning_rate=concept.learning_rate,
        seed=concept.seed,
        templates=", ".join(f"`{template}`" for template in concept.templates) or "unknown",
        strength=concept.strength,
        sampler=", ".join(f"{name} {value}" for name, value in sampler.items()) or "unknown",
    )


def pull(repo: str, revision: str = "") -> Concept:
    """Downloads a concept, once, and reads it. Raises UserError if there is none."""
    folder = hub.fetch(repo, revision, [concept_file.FILE_NAME])
    if not (folder / concept_file.FILE_NAME).is_file():
        raise UserError(f"{repo}: no {concept_file.FILE_NAME} there; expected a concept that was pushed")
    return concept_file.load(folder / concept_file.FILE_NAME)
