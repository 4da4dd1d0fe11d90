"""The half of the worker that draws: pictures of different people's concepts, together in one batch of the UNet."""

import functools
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from catversion_jax.api.pipeline import Pipeline, with_values
from catversion_jax.base import schedulers
from catversion_jax.base.pipeline import MINI
from catversion_jax.base.sampler_config import SamplerConfig
from catversion_jax.config import Config
from catversion_jax.methods.composition import check_composition
from catversion_jax.methods.concept_file import SAMPLER, Concept
from catversion_jax.methods.model_names import public_name
from catversion_jax.sampling.branches import batch_key
from catversion_jax.sampling.picture_record import png_info, texts_of
from catversion_jax.sampling.sampler import SampleRequest
from catversion_jax.service.problems import is_full
from catversion_jax.service.requests import DONE, FAILED, QUEUED, PictureRequest
from catversion_jax.service.store import Accepted, Store
from catversion_jax.training.turn import Snapshot
from catversion_jax.utils.errors import reason
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.log import warn
from catversion_jax.utils.paths import calling

AHEAD = 64
"""Waiting pictures that are looked at for those that can share a batch with the oldest."""


class PreviewOf(NamedTuple):
    """What a drawing is a preview of."""

    concept: str  # its id
    step: int
    number: int  # of the prompt
    is_done: bool  # whether the concept was


# By identity: two may ask for the same.
@dataclass(frozen=True, eq=False)
class Drawing:
    """A picture to draw."""

    prompt: str
    seed: int
    sampler: SamplerConfig
    concepts: tuple[Concept, ...]
    path: Path
    negative_prompt: str = ""
    width: int = 0
    height: int = 0
    id: str = ""  # of a picture of the store; "": a preview
    since: float = 0.0  # when it was asked for
    preview: PreviewOf | None = None

    @property
    def settings(self) -> tuple:
        return self.sampler, self.negative_prompt, self.width, self.height


def request_of(drawings: Sequence[Drawing]) -> SampleRequest:
    """Returns the request for drawings of the same settings."""
    prompts, seeds = tuple(d.prompt for d in drawings), tuple(d.seed for d in drawings)
    return SampleRequest(prompts, seeds, *drawings[0].settings)


def sampler_of(config: Config, asked: PictureRequest) -> SamplerConfig:
    """Returns the sampler's settings of a picture. Raises UserError for values that none can have."""
    given = {name: value for name in SAMPLER if (value := getattr(asked, name)) is not None}
    return with_values(config.sample.sampler, SAMPLER, given)


class Drawings:
    """The pictures and previews that wait. All methods are the worker's own."""

    def __init__(self, store: Store, config: Config, pipe: Pipeline):
        self.store, self.config, self.pipe = store, config, pipe
        self.previews: deque[Drawing] = deque()
        self.now: frozenset[str] = frozenset()  # ids of the pictures that are being drawn
        self._made: dict[str, Drawing] = {}  # by id, of pictures that wait
        self._load = functools.lru_cache(1024)(self.load)

    def show(self, snapshot: Snapshot) -> None:
        """Queues the previews of a concept, in place of those of an earlier step."""
        config = snapshot.config
        own = config.sample.prompts != self.config.sample.prompts
        prompts = config.sample_prompts(None if own else self.config.batch.previews)
        folder, is_done = self.store.concept_folder(snapshot.id) / "previews", self.is_done(snapshot.id)
        self.previews = deque(d for d in self.previews if d.preview and d.preview.concept != snapshot.id)
        if is_done and not prompts:
            self.store.set_previewed(snapshot.id)
        for number, prompt in enumerate(prompts):
            preview = PreviewOf(snapshot.id, snapshot.concept.steps, number, is_done)
            path = folder / f"{preview.step:06}-{number:03}.png"
            how = (prompt, config.seed, config.sample.sampler, (snapshot.concept,), path)
            self.previews.append(Drawing(*how, since=time.time(), preview=preview))

    def is_done(self, concept_id: str) -> bool:
        found = self.store.concept(concept_id)
        return found is not None and found.status == DONE

    def forget(self, concept_ids: Sequence[str]) -> None:
        """Drops the previews of concepts that are removed."""
        self.previews = deque(d for d in self.previews if d.preview and d.preview.concept not in concept_ids)
        self._made.clear()
        self._load.cache_clear()

    def load(self, concept_id: str, strength: float | None) -> Concept:
        return self.store.load_concept(concept_id).at(strength)

    def warm_up(self, drawings: Sequence[Drawing]) -> None:
        """Draws something that nobody sees."""
        for _ in self.pipe.sample_each(request_of(drawings), [drawing.concepts for drawing in drawings]):
            pass

    def waiting(self) -> bool:
        """Whether a picture waits."""
        return bool(self.previews) or self.store.count("pictures", [QUEUED]) > 0

    def draw(self) -> None:
        """Draws one batch: the oldest that waits, and those that can share it."""
        group = self.next_group()
        if not group:
            return
        self.now = frozenset(drawing.id for drawing in group)
        try:
            self.sample(group)
        # Whatever is wrong with one picture must not end the others, nor the worker.
        except Exception as error:
            if is_full(error):
                raise
            if len(group) == 1:
                self.fail(group[0], error)
                return
            # Whose fault it is shows when each is drawn by itself.
            for drawing in group:
                try:
                    self.sample([drawing])
                except Exception as own:
                    if is_full(own):
                        raise
                    self.fail(drawing, own)
        finally:
            self.now = frozenset()

    def next_group(self) -> list[Drawing]:
        """Returns the drawings of the next batch: the one that has waited longest, and those that can share it."""
        made: dict[str, Drawing] = {}
        for entry in self.store.with_status("pictures", [QUEUED], AHEAD):
            try:
                made[entry.id] = self._made.get(entry.id) or self.made(entry)
            except Exception as error:
                if is_full(error):
                    raise
                self.store.end("pictures", entry.id, FAILED, {"error": reason(error)})
        self._made = made
        waiting = sorted([*self.previews, *made.values()], key=lambda drawing: drawing.since)
        if not waiting:
            return []
        first = waiting[0]
        key = self.key(first)
        alike = (d for d in waiting[1:] if d.settings == first.settings and self.key(d) == key)
        return [first, *islice(alike, first.sampler.batch_size - 1)]

    def key(self, drawing: Drawing):
        return batch_key(self.pipe.base, drawing.prompt, [c for c in drawing.concepts if c.strength])

    def made(self, entry: Accepted) -> Drawing:
        """Returns the drawing of a picture that was asked for. Raises UserError if a concept cannot be used."""
        asked = entry.picture
        concepts = tuple(self._load(used.id, used.strength) for used in asked.concepts)
        model = self.config.model.path
        with calling(model or str(MINI), public_name(model) or "the mini model"):
            self.pipe.check({f"concept {used.id}": c for used, c in zip(asked.concepts, concepts, strict=True)})
        check_composition(concepts)
        return Drawing(
            asked.prompt,
            asked.seed,
            sampler_of(self.config, asked),
            concepts,
            self.store.picture_file(entry.id),
            asked.negative_prompt,
            asked.width or 0,
            asked.height or 0,
            entry.id,
            entry.created,
        )

    def sample(self, group: list[Drawing]) -> None:
        """Draws drawings that share a batch, and writes them."""
        request, of_each = request_of(group), [drawing.concepts for drawing in group]
        records = list(self.pipe.records(request, of_each))
        for i, image in self.pipe.sample_each(request, of_each):
            drawing = group[i]
            save = partial(Image.fromarray(image).save, format="PNG", pnginfo=png_info(texts_of(records[i])))
            if drawing.preview:
                drawing.path.parent.mkdir(exist_ok=True)
            write_atomically(drawing.path, save)
        with self.store.transaction():
            for drawing in group:
                self.end(drawing)
        for drawing in group:
            if drawing.preview:
                self.leave(drawing, drawing.preview)

    def end(self, drawing: Drawing) -> None:
        """Notes that a drawing was drawn."""
        if drawing.preview:
            concept_id, step, number, _ = drawing.preview
            self.store.add_preview(concept_id, step, number, drawing.prompt)
        elif not self.store.end("pictures", drawing.id, DONE, {}):
            drawing.path.unlink(missing_ok=True)  # it was removed while it was drawn

    def leave(self, drawing: Drawing, preview: PreviewOf) -> None:
        """Takes a preview out of the queue; after the last one of a concept that is done, nothing more comes of it."""
        left = {other.preview.concept for other in self.previews if other.preview and other is not drawing}
        if preview.is_done and preview.concept not in left:
            self.store.set_previewed(preview.concept)
        self.previews.remove(drawing)

    def fail(self, drawing: Drawing, error: Exception) -> None:
        """Notes why a picture failed; a concept without previews is done all the same."""
        if drawing.preview:
            warn(f"concept {drawing.preview.concept}: no preview: {reason(error)}")
            self.leave(drawing, drawing.preview)
        else:
            self.store.end("pictures", drawing.id, FAILED, {"error": reason(error)})


def check_drawable(config: Config, pipe: Pipeline, asked: PictureRequest) -> None:
    """Raises UserError for a picture that no sampler gives."""
    sampler = sampler_of(config, asked)
    schedulers.plan(pipe.base.networks.schedule, sampler.scheduler, sampler.steps)
    drawing = Drawing(asked.prompt, 0, sampler, (), Path(), asked.negative_prompt, asked.width or 0, asked.height or 0)
    request_of([drawing]).size(pipe.base.networks)
