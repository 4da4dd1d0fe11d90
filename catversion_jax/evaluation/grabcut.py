"""GrabCut: a rough mask redrawn along the edges of what it shows, by OpenCV, which the extra `grabcut` installs."""

import importlib.util

import numpy as np

from catversion_jax.utils.errors import UserError
from catversion_jax.utils.types import Bool, UInt8

ITERATIONS = 5


def check() -> None:
    """Raises UserError if OpenCV is not installed."""
    if importlib.util.find_spec("cv2") is None:
        raise UserError("grabcut: OpenCV is not installed; pip install opencv-python-headless, or leave it out")


def grabcut(image: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """The subject of an RGB image, of which the mask is a guess at every place: mixtures of the colours within and
    without, and the cheapest cut between them, in turns (Rother et al. 2004). The mask itself where it or what is found
    is empty or everything."""
    import cv2  # of the extra

    if not 0 < mask.mean() < 1:
        return mask
    labels = np.where(mask, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    cv2.setRNGSeed(0)  # of the mixtures' first centres
    image = np.ascontiguousarray(image[..., ::-1])
    cv2.grabCut(image, labels, None, np.zeros((1, 65)), np.zeros((1, 65)), ITERATIONS, cv2.GC_INIT_WITH_MASK)
    found = labels == cv2.GC_PR_FGD
    return found if 0 < found.mean() < 1 else mask
