"""Shared by all tests: two fake CPU devices, one compilation cache, models that are loaded once."""

import gc
import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before JAX is imported. The cache is shared by the test processes and the commands they start, and new each time.
# Unoptimized code: compiling is what takes the time here; the matrix products are library calls all the same.
FAST_COMPILE = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib") < "0.11":
    # XLA's older emitter of fused loops compiles a step in two thirds of the time. Newer releases do not have it, and
    # end the process without a word at a flag that they do not know.
    FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILE} --xla_force_host_platform_device_count=2"
os.environ.setdefault("CATVERSION_TEST_CACHE", tempfile.mkdtemp(prefix="catversion-test-cache-"))
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["CATVERSION_TEST_CACHE"]

# Tracing allocates millions of small objects, few of them in cycles: collecting them less often saves a tenth.
gc.set_threshold(100_000, 10, 10)

import jax
import jaxtyping
import numpy as np
import pytest

# Annotations of shapes and dtypes are checked in these modules, by jaxtyping with beartype. training.state and
# base.text_states are not among them: JAX also builds their trees of things that are no arrays.
CHECKED = (
    "base.noise_schedule", "base.pipeline", "base.prompt_tokens", "base.schedulers", "base.tokenizer", "base.words",
    "data.latents", "evaluation.masks", "evaluation.metrics", "evaluation.scores", "methods", "models",
    "sampling", "training.class_images", "training.concept_data", "training.step", "training.training_prompts",
    "utils.tree",
)  # fmt: skip
# The environments of `make parity` and `make tpu`, whose tests hand over arrays of other libraries, have no beartype.
if importlib.util.find_spec("beartype"):
    jaxtyping.install_import_hook([f"catversion_jax.{name}" for name in CHECKED], "beartype.beartype")

from catversion_jax.base import pipeline
from catversion_jax.utils import cache
from catversion_jax.utils.log import LOGGER
from tests import tiny

GOLDEN = Path(__file__).parent / "golden" / "mini_torch.npz"
cache.enable()


@pytest.fixture(scope="module")
def one_core() -> Iterator[None]:
    """Has commands compute as the workers of tests/fleet/clusters.py: XLA splits a sum over a CPU's threads."""
    from tests.commands import ENVIRONMENT

    ENVIRONMENT["NPROC"] = "1"
    yield
    del ENVIRONMENT["NPROC"]


OFFICIAL, DREAMBOOTH = (Path(__file__).parents[2] / "shared" / name for name in ("official", "dreambooth"))
needs_official = pytest.mark.skipif(not OFFICIAL.is_dir(), reason="needs ../shared/official")
needs_dreambooth = pytest.mark.skipif(not DREAMBOOTH.is_dir(), reason="needs ../shared/dreambooth")
EXCUSES = ("needs ../shared/official", "needs ../shared/dreambooth", "needs a GPU")
"""The only reasons to skip; any other skip is a failure, so that nothing is left out unseen."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and not any(excuse in str(report.longrepr) for excuse in EXCUSES):
        report.outcome = "failed"
    return report


@pytest.fixture(autouse=True)
def heard():
    """Our warnings reach pytest, whichever command ran in this process before and took them for its console."""
    LOGGER.handlers, LOGGER.propagate = [], True


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """What PyTorch computes on the mini model; pictures and latents moved to NHWC."""
    arrays = dict(np.load(GOLDEN))
    nchw = {"unet.sample", "unet.eps", "vae.mean", "vae.logvar", "vae.decoded", "image.pixel_values", "train.latents"}
    nchw |= {"ddim.x_T", "ddim.x_0_guidance5_prefix_p1_bias0", "train.noise"}
    return {key: np.moveaxis(array, -3, -1) if key in nchw else array for key, array in arrays.items()}


@pytest.fixture(scope="session")
def mini() -> pipeline.BasePipeline:
    return pipeline.load_pipeline()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random Stable Diffusion of a few hundred kilobytes, written in diffusers layout."""
    return tiny.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_model) -> pipeline.BasePipeline:
    return tiny.load(tiny_model)


@pytest.fixture
def one_device() -> list[jax.Device]:
    return jax.devices()[:1]


def max_error(actual, expected) -> float:
    """The largest absolute difference; printed, so that a report shows how close it was."""
    error = float(np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64)).max())
    print(f"max-abs error {error:.2e}")
    return error
