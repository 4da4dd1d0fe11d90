"""`catversion doctor`: reports what this machine has, and what is missing."""

import importlib.metadata
import platform
import shutil

import jax
import psutil
from absl import flags

from catversion_jax import __version__
from catversion_jax.base.pipeline import MINI
from catversion_jax.utils import cache
from catversion_jax.utils.devices import devices, devices_problem
from catversion_jax.weights.source import FOLDERS

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "array-record", "ml-collections",
    "msgspec", "tokenizers", "huggingface-hub", "safetensors", "numpy", "pillow", "jinja2", "matplotlib",
    "tensorboardX",
)  # fmt: skip
ACCELERATORS = {
    "nvidia-smi": ("gpu", "an NVIDIA driver is here, but JAX sees no GPU: pip install 'catversion-jax[cuda]'"),
}
"""Program -> (the platform that it implies, what to do if JAX does not see that platform)."""


def define_flags() -> None:
    """Defines no flags."""


def main(arguments: flags.FlagValues) -> int:
    """Prints the report; returns 1 if something that the commands need is missing."""
    without = devices_problem()
    sections = {
        "versions": [f"catversion-jax {__version__}, Python {platform.python_version()}", *map(version, PACKAGES)],
        "devices": ["none"] if without else [device_line(device) for device in devices()],
        "memory": [memory_line()],
        "compilation cache": cache_lines(),
    }
    missing = [without] if without else find_missing()
    sections["missing"] = missing or ["nothing"]
    for title, lines in sections.items():
        print(f"{title}:", *(f"  {line}" for line in lines), sep="\n")
    return 1 if missing else 0


def version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} missing"


def device_line(device: jax.Device) -> str:
    stats = device.memory_stats() or {}
    memory = f", {stats['bytes_limit'] / 2**30:.1f} GiB usable" if "bytes_limit" in stats else ""
    return f"{device.platform} {device.id}: {device.device_kind}{memory}"


def memory_line() -> str:
    memory = psutil.virtual_memory()
    cores = psutil.cpu_count()
    return f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB available; {cores} cores"


def cache_lines() -> list[str]:
    folder = cache.folder()
    entries = [path.stat().st_size for path in folder.glob("*-cache")] if folder.is_dir() else []
    counts = cache.read_counts(folder)
    both = (("last", counts.last), ("total", counts.total))
    hits = [f"{name}: {c.get('hits', 0)} hits, {c.get('misses', 0)} misses" for name, c in both]
    return [f"{folder}: {len(entries)} programs, {sum(entries) / 2**20:.1f} MiB", *hits]


def find_missing() -> list[str]:
    lines = [f"package {name}: pip install catversion-jax" for name in PACKAGES if version(name).endswith(" missing")]
    folders = [MINI / folder for component, folder in FOLDERS.items() if component != "text_2"]
    lines += [f"{folder}: reinstall catversion-jax" for folder in folders if not folder.is_dir()]
    for program, (name, advice) in ACCELERATORS.items():
        if shutil.which(program) and not any(device.platform == name for device in devices()):
            lines.append(advice)
    return lines
