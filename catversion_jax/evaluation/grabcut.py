"""GrabCut: refines a rough mask along the subject's edges with OpenCV, which the extra `grabcut` installs."""

import importlib.util

import numpy as np

from catversion_jax.utils.errors import UserError
from catversion_jax.utils.types import Bool, UInt8

ITERATIONS = 5


def is_installed() -> bool:
    return importlib.util.find_spec("cv2") is not None


def check_installed() -> None:
    """Raises UserError if OpenCV is not installed."""
    if not is_installed():
        raise UserError("grabcut: OpenCV is not installed; pip install 'catversion-jax[grabcut]', or leave it out")


def grabcut(image: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Returns the refined mask of the subject in an RGB image, treating `mask` as a guess at every position.

    GrabCut alternates between fitting colour mixtures inside and outside the mask and finding the cheapest cut between
    them (Rother et al. 2004). If `mask` or the result is empty or covers the image, `mask` is returned.
    """
    import cv2  # installed by the extra `grabcut`

    if not 0 < mask.mean() < 1:
        return mask
    labels = np.where(mask, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    # The mixtures start from random centres.
    cv2.setRNGSeed(0)
    image = np.ascontiguousarray(image[..., ::-1])
    models = np.zeros((1, 65)), np.zeros((1, 65))
    everywhere = (0, 0, image.shape[1], image.shape[0])  # a mask is given, so this rectangle is not read
    cv2.grabCut(image, labels, everywhere, *models, ITERATIONS, cv2.GC_INIT_WITH_MASK)
    found = labels == cv2.GC_PR_FGD
    return found if 0 < found.mean() < 1 else mask
