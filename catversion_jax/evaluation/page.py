"""The report of an evaluation: one HTML file that contains its images and plots."""

import base64
import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from catversion_jax.evaluation.image_sets import ImageSet
from catversion_jax.evaluation.masks import fill_background
from catversion_jax.evaluation.scores import SCORES
from catversion_jax.utils.errors import one_line
from catversion_jax.utils.image_grid import reduced
from catversion_jax.utils.types import UInt8

TEMPLATE = Path(__file__).parent / "page.html"
THUMBNAIL = 160  # pixels
COLUMNS = 6  # images in a row, at most; masked images follow them
PLOTTED = ("clip_t", "clip_i", "masked_clip_i", "dino")  # the cosines
COLOURS = ("#1b6ca8", "#d1603d", "#3f8f5b", "#7d5ba6")
MAX_LABELS = 40  # of a plot
MAX_ROWS = 40  # of a grid
LABEL_LENGTH = 60  # characters


def format_score(value: float | None, interval: Sequence[float] | None = None) -> str:
    """Formats a score and its interval."""
    if value is None:
        return "not measured"
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def thumbnail(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Returns an image, uncropped on a white square of at most THUMBNAIL pixels, as JPEG."""
    small = Image.fromarray(reduced(image, THUMBNAIL))
    square = Image.new("RGB", (max(small.size),) * 2, "white")
    square.paste(small, ((square.width - small.width) // 2, (square.height - small.height) // 2))
    buffer = io.BytesIO()
    square.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def thumbnails(shown: ImageSet) -> list[bytes]:
    """Returns the first COLUMNS images and, with masks, the same as the encoder sees them masked."""
    plain, filled = [], []
    for image, mask in shown.selected(range(min(COLUMNS, len(shown)))):
        plain.append(thumbnail(image))
        if mask is not None:
            filled.append(thumbnail(fill_background(image, mask)))
    return plain + filled


Rows = dict[str, list[bytes]]
"""Label -> the thumbnails of a row."""


def thumbnail_rows(references: ImageSet, prompts: Sequence[str], sampled: ImageSet) -> Rows:
    """Returns the rows of a concept's grid: the references, and each of the first MAX_ROWS prompts."""
    rows = {"references": thumbnails(references)}
    index: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        index.setdefault(prompt, []).append(i)
    return rows | {prompt: thumbnails(sampled.selected(index[prompt])) for prompt in list(index)[:MAX_ROWS]}


def encoded(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


@contextlib.contextmanager
def plain_text() -> Iterator[None]:
    """Makes matplotlib draw every text as it is: prompts and names are not TeX, and may have characters of any font."""
    import matplotlib  # here: its import takes a second, and only this command needs it

    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def plot_label(text: str) -> str:
    """Returns a prompt or name as a plot shows it: in one short line."""
    return one_line(text, LABEL_LENGTH)


def plot_rows(rows: Sequence[dict], label: str) -> str:
    """Plots each row's cosines with their intervals."""
    from matplotlib.figure import Figure

    rows = rows[:MAX_LABELS]
    figure = Figure((9, 1.2 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(rows))[::-1]
    shown = [name for name in PLOTTED if any(row[name] is not None for row in rows)]
    for i, name in enumerate(shown):
        offset = 0.15 * ((len(shown) - 1) / 2 - i)
        for row, place in zip(rows, places, strict=True):
            if row[name] is None:
                continue
            if interval := row["intervals"][name]:
                axes.plot(interval, [place + offset] * 2, color=COLOURS[i], linewidth=2, alpha=0.5)
            axes.plot(row[name], place + offset, "o", color=COLOURS[i], markersize=4)
        axes.plot([], [], "o", color=COLOURS[i], label=name)
    axes.set_yticks(places, [plot_label(row[label]) for row in rows])
    axes.set_xlabel("cosine, with its 95 % interval")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1 + 0.6 / (1 + 0.32 * len(rows))), ncols=4, frameon=False)
    return png(figure)


def plot_plane(concepts: Sequence[dict]) -> str:
    """Plots CLIP-I over CLIP-T, with a point for each prompt."""
    from matplotlib.figure import Figure

    figure = Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    for concept in concepts:
        points = [(row["clip_t"], row["clip_i"]) for row in concept["prompts"]]
        axes.plot(*zip(*points, strict=True), "o", markersize=5, alpha=0.7, label=plot_label(concept["concept"]))
    axes.set_xlabel("clip_t: like the prompt")
    axes.set_ylabel("clip_i: like the references")
    axes.grid(alpha=0.3)
    if len(concepts) <= len(COLOURS) * 2:
        axes.legend(frameon=False)
    return png(figure)


def png(figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return encoded(buffer.getvalue(), "png")


def render(result: dict, pictures: dict[str, Rows]) -> str:
    """Returns the HTML page of the result that `catversion evaluate` writes as JSON, with a grid of each concept."""
    import jinja2  # here: only this command needs it

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    concepts = result["concepts"]
    several = len(concepts) > 1
    with plain_text():
        rows_plot = plot_rows(*((concepts, "concept") if several else (concepts[0]["prompts"], "prompt")))
        plane = plot_plane(concepts)
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        result=result,
        scores=SCORES,
        number=format_score,
        rows_plot=rows_plot,
        plane=plane,
        grids={
            name: {label: [encoded(data, "jpeg") for data in row] for label, row in rows.items()}
            for name, rows in pictures.items()
        },
        most=MAX_ROWS,
    )
