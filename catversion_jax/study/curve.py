"""The figure of text alignment against image alignment, one curve a method over its strengths (Kumari et al. 2022)."""

import io
import itertools
from collections.abc import Mapping

from PIL import Image

from catversion_jax.study.rows import CurveRow

SIZE, DPI = (7, 5), 120  # inches, and dots per inch


def figure(curves: Mapping[str, CurveRow], base: tuple[float | None, float | None]) -> Image.Image:
    """Draws a curve for each method, a point for each strength, and the base model's point (CLIP-I, CLIP-T)."""
    from matplotlib.figure import Figure  # here, as in evaluation/page.py: its import takes a second

    canvas = Figure(SIZE, DPI, layout="constrained")
    axes = canvas.subplots()
    for (method, row), marker in zip(curves.items(), itertools.cycle("osD^vP")):
        strengths, images, texts = zip(*row["points"], strict=True)
        (line,) = axes.plot(images, texts, marker=marker, label=method.replace("_", " "))
        for strength, x, y in zip(strengths, images, texts, strict=True):
            axes.annotate(f"{strength:g}", (x, y), (4, 4), textcoords="offset points", size=8, color=line.get_color())
    if base[0] is not None and base[1] is not None:
        axes.plot(base[0], base[1], "*", color="black", markersize=14, label="base model")
    axes.set(xlabel="image alignment (CLIP-I)", ylabel="text alignment (CLIP-T)", title="Each method over its strength")
    axes.grid(alpha=0.3)
    axes.legend()
    png = io.BytesIO()
    canvas.savefig(png, format="png")
    return Image.open(png).convert("RGB")
