"""The report of an evaluation: one HTML file that contains its images and plots."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from catversion_jax.evaluation.scores import SCORES, MaskedImages
from catversion_jax.utils.image_grid import grid

TEMPLATE = Path(__file__).parent / "page.html"
THUMBNAIL = 128  # pixels
COLUMNS = 6  # images in a row, at most; masked images follow them
PLOTTED = ("clip_t", "clip_i", "masked_clip_i", "dino")  # the cosines
COLOURS = ("#1b6ca8", "#d1603d", "#3f8f5b", "#7d5ba6")
MAX_LABELS = 40


def format_score(value: float | None, interval: Sequence[float] | None = None) -> str:
    """Formats a score and its interval."""
    if value is None:
        return "not measured"
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def thumbnails(images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns the first COLUMNS images, each uncropped on a white square."""
    out = []
    for image in images[:COLUMNS]:
        small = Image.fromarray(image)
        small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
        square = Image.new("RGB", (max(small.size),) * 2, "white")
        square.paste(small, ((square.width - small.width) // 2, (square.height - small.height) // 2))
        out.append(np.asarray(square))
    return out


def samples_grid(references: MaskedImages, prompts: Sequence[str], sampled: MaskedImages) -> Image.Image:
    """Returns a grid of the references and a row for each prompt; with masks, also as the encoder sees them masked."""

    def row(shown: MaskedImages) -> list[np.ndarray]:
        return thumbnails(shown.images) + (thumbnails(shown.masked()) if shown.masks is not None else [])

    rows = {"references": row(references)}
    for prompt in dict.fromkeys(prompts):
        index = [i for i, p in enumerate(prompts) if p == prompt]
        rows[prompt] = row(sampled.selected(index))
    return grid(list(rows.values()), list(rows))


def encoded(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def jpeg(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return encoded(buffer.getvalue(), "jpeg")


def plot_rows(rows: Sequence[dict], label: str) -> str:
    """Plots each row's cosines with their intervals."""
    from matplotlib.figure import Figure  # here: its import takes a second, and only this command needs it

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
    axes.set_yticks(places, [row[label] for row in rows])
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
        axes.plot(*zip(*points, strict=True), "o", markersize=5, alpha=0.7, label=concept["concept"])
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


def render(result: dict, grids: dict[str, Image.Image]) -> str:
    """Returns the HTML page of the result that `catversion evaluate` writes as JSON."""
    import jinja2  # here: only this command needs it

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    concepts = result["concepts"]
    several = len(concepts) > 1
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        result=result,
        scores=SCORES,
        number=format_score,
        rows_plot=plot_rows(*((concepts, "concept") if several else (concepts[0]["prompts"], "prompt"))),
        plane=plot_plane(concepts),
        grids={name: jpeg(image) for name, image in grids.items()},
    )
