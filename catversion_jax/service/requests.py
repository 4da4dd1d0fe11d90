"""What people ask of the service, and what they are answered: the bodies of its requests, checked."""

from typing import Annotated, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field

from catversion_jax.base.sampler_config import MAX_STRENGTH

MOST_PROMPT = 4096  # characters
MOST_CONCEPTS = 4  # of a picture
MOST_PICTURES = 64  # of a request

QUEUED, PREPARING, TRAINING, DRAWING = "queued", "preparing", "training", "drawing"
DONE, FAILED, CANCELLED = "done", "failed", "cancelled"
REMOVING = "removing"  # asked to be gone, which its answers do not show
ENDED = (DONE, FAILED, CANCELLED)
Status = Literal["queued", "preparing", "training", "drawing", "done", "failed", "cancelled"]

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Prompt = Annotated[str, Field(min_length=1, max_length=MOST_PROMPT, pattern=r"\S")]
Id = Annotated[str, Field(pattern=r"^[0-9a-f]{24}$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ConceptRequest(Strict):
    """A concept to learn: everything but its photos."""

    class_word: Annotated[str, Field(min_length=1, max_length=100)]
    create_masks: bool = False
    steps: Annotated[int, Field(ge=1)] | None = None
    seed: Seed = 0
    prompts: Annotated[list[Prompt], Field(max_length=64)] = []
    urls: Annotated[list[Annotated[str, Field(max_length=2048)]], Field(max_length=100)] = []
    webhook_url: Annotated[str, Field(max_length=2048)] | None = None


class PhotosForm(BaseModel):
    """Photos, in one of three ways; captions and masks are in the order of the images."""

    model_config = ConfigDict(extra="forbid")

    images: Annotated[list[UploadFile], Field(max_length=100)] = []
    zip: UploadFile | None = None
    masks: Annotated[list[UploadFile], Field(max_length=100)] = []
    captions: Annotated[list[Annotated[str, Field(max_length=MOST_PROMPT)]], Field(max_length=100)] = []


class ConceptForm(PhotosForm, ConceptRequest):
    """A concept to learn, with its photos."""

    model_config = ConfigDict(extra="forbid", frozen=False)

    def request(self) -> ConceptRequest:
        return ConceptRequest(**{name: getattr(self, name) for name in ConceptRequest.model_fields})


class Preview(BaseModel):
    step: int
    prompt: str
    url: str


class ConceptAnswer(BaseModel):
    """How a concept is doing."""

    id: str
    status: Status
    class_word: str
    created: float  # seconds since 1970, as all times
    position: int | None = None  # in the queue, from 1 on; None for one that waits no more
    estimated_seconds: float | None = None  # until it is done; None if that is not known
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    losses: list[tuple[int, float]] = []  # step and loss, thinned out
    photos: list[str] = []  # as training sees them
    warnings: list[str] = []
    previews: list[Preview] = []
    previewed: bool = False  # whether all of them are there
    concept: str | None = None
    seconds: float | None = None
    error: str | None = None


class ConceptPage(BaseModel):
    concepts: list[ConceptAnswer]
    next: str | None  # what to give as `after` for the next page


class Strength(Strict):
    id: Id
    strength: Annotated[float, Field(ge=0, le=MAX_STRENGTH)] | None = None  # None: as the concept records it


class PictureRequest(Strict):
    """A picture to draw; what is not given is as the service's config has it."""

    prompt: Prompt
    concepts: Annotated[list[Strength], Field(max_length=MOST_CONCEPTS)] = []
    seed: Seed = 0
    negative_prompt: Annotated[str, Field(max_length=MOST_PROMPT)] = ""
    width: Annotated[int, Field(ge=8, le=8192)] | None = None
    height: Annotated[int, Field(ge=8, le=8192)] | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    guidance: Annotated[float, Field(ge=0, le=100)] | None = None
    scheduler: Annotated[str, Field(max_length=40)] | None = None


class PicturesRequest(Strict):
    """Pictures to draw; with `wait`, the answer comes when they have ended."""

    pictures: Annotated[list[PictureRequest], Field(min_length=1, max_length=MOST_PICTURES)]
    wait: bool = False


class PictureAnswer(BaseModel):
    id: str
    status: Status
    created: float
    ended: float | None
    request: PictureRequest
    warnings: list[str] = []
    url: str | None = None
    png: str | None = None  # base64, if it was waited for
    error: str | None = None


class PicturesAnswer(BaseModel):
    pictures: list[PictureAnswer]


class PicturePage(PicturesAnswer):
    next: str | None


class CheckedPhoto(BaseModel):
    """A photo as training will see it."""

    image: str  # data: URL of a PNG, as is the next
    subject: str | None  # with its background dimmed; None without a mask
    caption: str
    warnings: list[str]


class CheckAnswer(BaseModel):
    photos: list[CheckedPhoto]


class ServiceAnswer(BaseModel):
    """What this service has."""

    version: str
    model: str
    resolution: int
    steps: int
    sampling_steps: int
    guidance: float
    strength: float
    sizes: list[tuple[int, int]]
    url_hosts: list[str]
    limits: dict[str, int]
    can_create_masks: bool


class SecretAnswer(BaseModel):
    secret: str
