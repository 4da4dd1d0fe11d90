"""Files of Hugging Face in the local cache of huggingface_hub: downloaded once, then found without a network."""

import os
from pathlib import Path

from catversion_jax.utils.errors import kind_of


def endpoint() -> str:
    """The server that models are downloaded from: $HF_ENDPOINT, which names a mirror, or Hugging Face itself."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def is_cached(repo: str, revision: str) -> bool:
    """Whether the cache has a model of this name and revision, so that the person has asked for it before."""
    from huggingface_hub import errors, try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(repo, "model_index.json", revision=revision or None), str)
    except errors.HFValidationError:
        return False


def fetch(repo: str, revision: str, patterns: list[str]) -> Path:
    """Returns the cached folder with the repo's files that match `patterns`; interrupted downloads are resumed.

    Raises UserError, naming `repo`, for what the user can fix.
    """
    # Imported here, because it takes half a second and few commands need it.
    from huggingface_hub import errors, snapshot_download

    server = endpoint()
    log_in = "log in (`hf auth login`) or set HF_TOKEN"
    # The first match counts, so GatedRepoError stands before its base class RepositoryNotFoundError.
    reasons = [
        (errors.GatedRepoError, f"only for those who agreed to its terms; do so on {server}/{repo}, then {log_in}"),
        (errors.RevisionNotFoundError, f"has no revision {revision!r}; correct config.model.revision"),
        (errors.RepositoryNotFoundError, f"no such folder or file, nor model on {server}; if private: {log_in}"),
        (errors.HFValidationError, f"no such folder or file, and no name of a model on {server}"),
        (
            errors.LocalEntryNotFoundError,
            f"no such folder or file, not in the cache, and {server} is out of reach or HF_HUB_OFFLINE set; "
            f"run `hf download {repo} --local-dir FOLDER` where there is a network and give that folder",
        ),
    ]
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns, endpoint=server))
    except Exception as error:  # from requests, httpx or the disk, depending on the library's version
        plain = f"not downloaded ({type(error).__name__}: {str(error).split(chr(10))[0]}); run it again, it goes on"
        reason = next((text for kind, text in reasons if isinstance(error, kind)), plain)
        raise kind_of(error)(f"{repo}: {reason}") from error
