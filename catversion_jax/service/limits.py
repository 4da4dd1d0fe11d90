"""What the operator of a service allows: its limits, which are the command's flags."""

from dataclasses import dataclass

from catversion_jax.data.photos import MAX_PHOTOS
from catversion_jax.utils.settings import at_least, between, setting


@dataclass(frozen=True)
class Limits:
    """The most of each thing; "a token" means whoever has it, or everybody where there are no tokens."""

    upload_mib: int = setting(256, "Size of a request, in MiB.", between(1, 2**16))
    photos: int = setting(16, "Photos of a concept; each slot has room for as many.", between(1, MAX_PHOTOS))
    megapixels: int = setting(64, "Size of a photo, in millions of pixels.", between(1, 205))
    steps: int = setting(2000, "Training steps of a concept.", between(1, 2**20))
    prompts: int = setting(4, "Preview prompts of a concept.", between(0, 64))
    sampling_steps: int = setting(100, "Sampling steps of a picture.", between(1, 1000))
    concepts: int = setting(20, "Concepts of a token that wait or train at one time.", at_least(1))
    pictures: int = setting(500, "Pictures of a token that wait at one time.", at_least(1))
    requests: int = setting(50, "Requests of a token a second.", at_least(1))
