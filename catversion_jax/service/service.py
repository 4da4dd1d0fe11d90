"""The service: what is accepted, what is answered, and what is removed. It knows nothing of HTTP."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from catversion_jax import __version__
from catversion_jax.api.pipeline import Pipeline
from catversion_jax.base.prompt_weights import weighted_parts
from catversion_jax.config import Config
from catversion_jax.evaluation import grabcut
from catversion_jax.methods.composition import check_composition
from catversion_jax.methods.concept_file import Concept
from catversion_jax.methods.concept_model import warnings
from catversion_jax.methods.model_names import public_name
from catversion_jax.sampling.picture_input import check_size_of_image
from catversion_jax.service.drawing import check_drawable
from catversion_jax.service.learning import config_of_request
from catversion_jax.service.limits import Limits
from catversion_jax.service.metrics import Metrics
from catversion_jax.service.outbound import checked_url, checked_webhook
from catversion_jax.service.problems import Problem
from catversion_jax.service.requests import (
    DONE,
    DRAWING,
    ENDED,
    PREPARING,
    QUEUED,
    REMOVING,
    ConceptAnswer,
    ConceptForm,
    ConceptRequest,
    PictureAnswer,
    PictureRequest,
    PicturesRequest,
    Preview,
    ServiceAnswer,
    Status,
)
from catversion_jax.service.store import Accepted, Key, Store
from catversion_jax.service.uploads import check_count, receive_photos
from catversion_jax.service.webhooks import secret_of, secret_text
from catversion_jax.service.worker import Worker
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.settings import is_text


@dataclass(frozen=True)
class Rules:
    """What the operator allows, beside the limits."""

    limits: Limits = Limits()
    url_hosts: tuple[str, ...] = ()  # that photos may be fetched from
    sizes: tuple[tuple[int, int], ...] = ()  # of pictures, beside the model's own; each is compiled once
    names: Mapping[str, str] | None = None  # of the tokens, by their digests; None: no tokens, this machine alone


class ConceptService:
    """A running service. Any thread may call it."""

    def __init__(self, config: Config, pipe: Pipeline, store: Store, worker: Worker, rules: Rules):
        self.config, self.pipe, self.store, self.worker, self.rules = config, pipe, store, worker, rules
        self.limits = rules.limits
        self.metrics = Metrics(store, worker)
        self.draining = False
        for size in rules.sizes:
            check_size_of_image(*size, pipe.base.networks)

    # What is accepted.

    def add_concept(self, owner: str, form: ConceptForm, key: str | None) -> Accepted:
        """Accepts a concept. Raises UserError or Problem for one that is not."""
        asked = form.request()
        self.check_concept(asked)
        if bool(asked.urls) + bool(form.images) + (form.zip is not None) != 1:
            raise UserError("photos: expected them in one way: as `images` (repeated), as one `zip`, or as `urls`")
        with self.store.incoming() as received:
            digest = receive_photos(received, form, self.limits)
            known = None if key is None else Key(key, digest_of_request(digest, asked.model_dump_json()))
            kept = self.store.kept(owner, known)
            ids = kept or [self.store.add_concept(owner, asked, received, known, self.limits.concepts)]
        self.worker.wake()
        return self.concept_entry(owner, ids[0])

    def check_concept(self, asked: ConceptRequest) -> None:
        """Raises UserError for a concept that could not be learned, as far as that is known without its photos."""
        limits = self.limits
        if asked.steps is not None and asked.steps > limits.steps:
            raise UserError(f"steps={asked.steps}: expected at most {limits.steps}")
        if len(asked.prompts) > limits.prompts:
            raise UserError(f"prompts: {len(asked.prompts)}; expected at most {limits.prompts}")
        config_of_request(self.config, asked, Path("photos"))
        for prompt in asked.prompts:
            weighted_parts(prompt)
        if asked.create_masks:
            grabcut.check_installed()
        check_count(len(asked.urls), limits)
        for url in asked.urls:
            checked_url(url, self.rules.url_hosts)
        if asked.webhook_url is not None:
            checked_webhook(asked.webhook_url, self.rules.url_hosts)

    def add_pictures(self, owner: str, asked: PicturesRequest, key: str | None) -> list[str]:
        """Accepts pictures; returns their ids. Raises UserError or Problem for one that is not."""
        known = None if key is None else Key(key, digest_of_request(asked.model_dump_json(exclude={"wait"})))
        if (kept := self.store.kept(owner, known)) is not None:
            return kept
        checked = [(picture, self.check_picture(owner, picture)) for picture in asked.pictures]
        ids = self.store.add_pictures(owner, checked, known, self.limits.pictures)
        self.worker.wake()
        return ids

    def check_picture(self, owner: str, asked: PictureRequest) -> list[str]:
        """Returns likely mistakes in a picture. Raises UserError or Problem for one that could not be drawn."""
        for text in (asked.prompt, asked.negative_prompt):
            if not is_text(text):
                raise UserError("a prompt holds a NUL or half of a character; expected text")
            weighted_parts(text)
        if asked.steps is not None and asked.steps > self.limits.sampling_steps:
            raise UserError(f"steps={asked.steps}: expected at most {self.limits.sampling_steps}")
        size = (asked.width or self.own_size[0], asked.height or self.own_size[1])
        if size not in self.sizes:
            known = ", ".join(f"{width}x{height}" for width, height in self.sizes)
            raise UserError(f"{size[0]}x{size[1]}: no size of this service; expected one of {known}")
        check_drawable(self.config, self.pipe, asked)
        concepts = [self.concept_to_draw(owner, used.id).at(used.strength) for used in asked.concepts]
        check_composition(concepts)
        return warnings(self.pipe.base, [asked.prompt], concepts) if concepts else []

    def check_done(self, owner: str, concept_id: str) -> None:
        """Raises Problem unless an owner's concept is done."""
        if self.concept_entry(owner, concept_id).status != DONE:
            raise Problem(409, f"concept {concept_id}: not done; wait until it is")

    def concept_to_draw(self, owner: str, concept_id: str) -> Concept:
        self.check_done(owner, concept_id)
        return self.store.load_concept(concept_id)

    # What is answered.

    @property
    def own_size(self) -> tuple[int, int]:
        return (self.pipe.base.networks.resolution,) * 2

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return list(dict.fromkeys([self.own_size, *self.rules.sizes]))

    def concept_entry(self, owner: str, concept_id: str) -> Accepted:
        """Returns an owner's concept. Raises Problem if it is not there, or somebody else's."""
        return self.owned(self.store.concept(concept_id), owner, f"concept {concept_id}")

    def picture_entry(self, owner: str, picture_id: str) -> Accepted:
        return self.owned(self.store.picture(picture_id), owner, f"picture {picture_id}")

    def owned(self, entry: Accepted | None, owner: str, what: str) -> Accepted:
        if entry is None or entry.owner != owner or entry.status == REMOVING:
            raise Problem(404, f"{what}: not found")
        return entry

    def concept_answer(self, entry: Accepted) -> ConceptAnswer:
        """Returns how a concept is doing."""
        asked, outcome, learning = entry.concept, entry.outcome, self.worker.learning
        progress = learning.progress.get(entry.id) if learning else None
        answer = ConceptAnswer(
            id=entry.id,
            status=cast(Status, entry.status),
            class_word=asked.class_word,
            created=entry.created,
            steps=asked.steps or self.config.train.steps,
            photos=[f"/v1/concepts/{entry.id}/photos/{i}" for i in range(outcome.get("photos", 0))],
            previews=list(self.previews(entry)),
            previewed=entry.previewed,
            concept=f"/v1/concepts/{entry.id}/concept.safetensors" if entry.status == DONE else None,
            **{name: outcome[name] for name in ("step", "loss", "losses", "seconds", "error") if name in outcome},
            warnings=outcome.get("warnings", []),
        )
        if progress is not None and entry.status not in ENDED:
            answer.step, answer.loss, answer.losses = progress.step, progress.loss, list(progress.losses)
        if entry.status in ENDED:
            return answer
        ahead = self.store.count("concepts", (QUEUED, PREPARING), before=entry.number)
        answer.position = ahead + 1 if entry.status in (QUEUED, PREPARING) else None
        seconds = learning.estimated_seconds(entry, ahead) if learning else None
        answer.estimated_seconds = None if seconds is None else round(seconds, 1)
        return answer

    def previews(self, entry: Accepted) -> Iterator[Preview]:
        for step, number, prompt in entry.outcome.get("previews", []):
            yield Preview(step=step, prompt=prompt, url=f"/v1/concepts/{entry.id}/previews/{step}/{number}")

    def picture_answer(self, entry: Accepted) -> PictureAnswer:
        """Returns how a picture is doing."""
        status = DRAWING if entry.status == QUEUED and entry.id in self.worker.drawings.now else entry.status
        return PictureAnswer(
            id=entry.id,
            status=cast(Status, status),
            created=entry.created,
            ended=entry.ended,
            request=entry.picture,
            warnings=entry.outcome.get("warnings", []),
            url=f"/v1/pictures/{entry.id}.png" if entry.status == DONE else None,
            error=entry.outcome.get("error"),
        )

    def service_answer(self) -> ServiceAnswer:
        config = self.config
        return ServiceAnswer(
            version=__version__,
            model=public_name(config.model.path) or "mini",
            resolution=self.own_size[0],
            steps=config.train.steps,
            sampling_steps=config.sample.steps,
            guidance=config.sample.guidance,
            strength=config.sample.strength,
            sizes=self.sizes,
            url_hosts=list(self.rules.url_hosts),
            limits=asdict(self.limits),
            can_create_masks=grabcut.is_installed(),
        )

    def webhook_secret(self, owner: str) -> str:
        """Returns the key that an owner's webhooks are signed with."""
        return secret_text(secret_of(self.store, owner))

    # What is removed.

    def ask_to_remove(self, owner: str, concept_id: str) -> None:
        """Asks the worker to cancel a concept, and to remove it with its photos and all that was learned from them."""
        entry = self.concept_entry(owner, concept_id)
        self.store.set_status("concepts", entry.id, REMOVING)
        self.worker.wake()

    def is_removed(self, concept_id: str) -> bool:
        found = self.store.concept(concept_id)
        return found is None or found.status != REMOVING

    def remove_picture(self, owner: str, picture_id: str) -> None:
        self.store.remove_picture(self.picture_entry(owner, picture_id).id)


def digest_of_request(*parts: str) -> str:
    """Returns a hash of a request, by which another one under the same key is told."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def page_of(entries: Sequence[Accepted], count: int) -> tuple[list[Accepted], str | None]:
    """Returns the entries of a page, and where the next one begins, given one more entry than the page has."""
    return list(entries[:count]), str(entries[count - 1].number) if len(entries) > count else None
