"""`catversion bench`: how fast the training step is, for C concepts with batches of B; one table, also as JSON.

Each size has a process of its own: its memory peak is its own, its first compilation is a cold one, and one that runs
out of memory does not end the others. What is seen are random numbers of a run's shapes: the step has neither photos
nor a VAE in it.
"""

import contextlib
import datetime
import itertools
import json
import math
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from absl import flags
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from catversion_jax import cache, text, torch_bench
from catversion_jax import config as config_lib
from catversion_jax.convert import ldm
from catversion_jax.data.posteriors import bucket
from catversion_jax.diffusion import NoiseSchedule
from catversion_jax.errors import UserError, short
from catversion_jax.files import write_atomically
from catversion_jax.models.clip import CLIPTextModel
from catversion_jax.pipeline import COMPONENTS, DTYPES, MINI, Networks, abstract
from catversion_jax.run_dir import plain
from catversion_jax.sharding import make_mesh, sharding
from catversion_jax.source import Source, open_source
from catversion_jax.state import ConceptData, Frozen, TrainState, init_state
from catversion_jax.train import ACCELERATOR_STEPS_PER_DISPATCH, load_model
from catversion_jax.train_step import StepConfig, compile_chunk
from catversion_jax.types import Array, Float, Key, Params

SIZES = "1x2,4x2,16x2,32x2"
REPETITIONS = 10  # timed dispatches for each size, unless --steps says how many
WARM_UP = 2  # dispatches before these
PHOTOS = 5  # of each concept
OURS = "catversion"
LABELS = {OURS: OURS} | {what: recipe.label for what, recipe in torch_bench.RECIPES.items()}

PEAKS = {
    r"NVIDIA H100 .*HBM3": 989e12,
    r"NVIDIA H200": 989e12,
    r"NVIDIA A100.*": 312e12,
    r"TPU v4": 275e12,
    r"TPU v5 ?(lite|e)": 197e12,
    r"TPU v5p?": 459e12,
    r"TPU v6 ?(lite|e)": 918e12,
}
"""Device kind -> FLOP/s of dense bfloat16 matrix products. Sources: NVIDIA's data sheets of the H100 and H200 (SXM) and
A100, without sparsity; cloud.google.com/tpu/docs/system-architecture-tpu-vm, per chip."""

PRODUCT = 2048  # side of the float32 matrices whose product is a CPU's peak

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
RANDOM = {
    "text": {
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "max_position_embeddings": 77,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "projection_dim": 768,
        "vocab_size": 49408,
    },
    "unet": {
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "sample_size": 64,
    },
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
    },
}
"""component -> config.json of Stable Diffusion 1.x."""
RANDOM_FOR = (SD15, "CompVis/stable-diffusion-v1-4")
"""Models that random weights stand in for where they are not on the disk."""

MEMORY_RAN_OUT = re.compile(r"RESOURCE_EXHAUSTED|out of memory|can't allocate memory", re.IGNORECASE)


def define_flags() -> None:
    config_flags.DEFINE_config_file(
        "config", None, "A file of configs/; without it, the mini model on a CPU and Stable Diffusion 1.5 elsewhere."
    )
    flags.DEFINE_string("sizes", SIZES, "CONCEPTSxBATCH, several separated by commas.")
    flags.DEFINE_integer(
        "steps", None, f"Timed steps for each size, in whole dispatches; {REPETITIONS} dispatches.", lower_bound=1
    )
    flags.DEFINE_enum("vs", None, ["torch"], "Also time PyTorch and diffusers, taking turns.")
    flags.DEFINE_string("out", None, "A JSON file for the table and what it was measured on.")


@dataclass(frozen=True)
class Job:
    """One size."""

    config: ConfigDict | None  # None: `default_config` on the machine's devices
    concepts: int
    batch: int
    steps: int | None  # None: REPETITIONS dispatches
    vs_torch: bool


@dataclass(frozen=True)
class Row:
    """One line of the table. What does not apply or is not known is None.

    `flops_per_step` are those of a step over all devices, as XLA counts them: multiplications and additions of the
    matrix products and convolutions, forward and backward to the prefix, and of everything elementwise, a few percent.
    On a CPU they are counted in the compiled program. Elsewhere library calls and fused attention (cuDNN, Pallas) count
    as nothing there, so they are counted in the same step lowered for a CPU, where each product is to be seen; what a
    device's own attention computes twice to save memory does not count. `bytes_per_step` is what the operations of the
    compiled program read and write, as XLA counts it: more than reaches the memory where caches help. Of a loop over
    the steps, XLA counts the body once.
    """

    what: str  # OURS, or a key of torch_bench.RECIPES
    concepts: int
    batch: int
    error: str | None = None  # why there are no numbers
    trace_s: float | None = None  # tracing and lowering, which no cache saves
    compile_cold_s: float | None = None  # by XLA, with an empty persistent cache
    compile_cached_s: float | None = None  # traced again in the same process, then from the persistent cache
    devices: int | None = None  # that the step is split over
    steps_per_dispatch: int | None = None
    repetitions: int | None = None  # timed dispatches
    ms_per_step: float | None = None  # median over the repetitions
    ms_per_step_smallest: float | None = None
    images_per_s: float | None = None  # at the median
    concepts_per_hour: float | None = None  # at the config's train.steps of `batch` images
    flops_per_step: float | None = None
    bytes_per_step: float | None = None
    flops_per_byte: float | None = None
    peak_flops_per_s: float | None = None  # of the matrix products of all devices
    utilisation: float | None = None  # share of that peak, at the median
    peak_memory_bytes: float | None = None  # of one device
    peak_memory_from: str | None = None  # `device`: what its allocator held; `program`: what the compiled step asks for
    ours_per_theirs: float | None = None  # ratio of the times of a step, medians
    ours_per_theirs_smallest: float | None = None


class Measured(NamedTuple):
    """What a size's process hands back."""

    facts: dict[str, Any]  # of the machine and the model
    rows: list[Row]
    networks: Networks
    config: ConfigDict


def main(arguments: flags.FlagValues) -> int:
    """Print the table; the row of a size that does not fit says so."""
    sizes = parse_sizes(arguments.sizes)
    if arguments.vs:
        torch_bench.check_installed()
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # PyTorch shall find memory too
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded
    facts: dict[str, Any] = {"date": datetime.date.today().isoformat(), "jax": jax.__version__}
    rows: list[Row] = []
    for concepts, batch in (bar := tqdm(sizes, unit=" sizes")):
        bar.set_description(f"{concepts}x{batch}")
        of_machine, of_size = run(Job(arguments.config, concepts, batch, arguments.steps, arguments.vs is not None))
        facts |= of_machine
        rows += of_size
        if arguments.out:
            report = json.dumps(facts | {"rows": [asdict(row) for row in rows]}, indent=1)
            write_atomically(config_lib.expand(arguments.out), lambda path, report=report: path.write_text(report))
    print(*(f"{name}: {value}" for name, value in facts.items() if name != "config"), sep="\n")
    print("", to_table(rows), sep="\n")
    return 0


def parse_sizes(value: str) -> list[tuple[int, int]]:
    """Concepts and batch of each size."""
    sizes = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size.strip()) for size in value.split(",")]
    if not all(sizes):
        raise UserError(f"--sizes={value}: expected CONCEPTSxBATCH, several separated by commas, such as {SIZES}")
    return [(int(size[1]), int(size[2])) for size in sizes]


def run(job: Job) -> tuple[dict[str, Any], list[Row]]:
    """Measure a size in fresh processes; touches no device itself, since a TPU can be held by one process only."""
    try:
        measured = fresh(measure, job)
    except (RuntimeError, MemoryError) as error:
        return {}, [Row(OURS, job.concepts, job.batch, of_memory(error))]
    facts, rows = measured.facts, measured.rows
    if facts["platform"] != "cpu":
        flops = fresh(count_flops, job, measured.config, measured.networks)
        rows = [with_flops(row, flops) if row.what == OURS else row for row in rows]
    return facts, rows


def fresh(function: Callable, *arguments):
    """Call `function` in a process that is started for it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def of_memory(error: RuntimeError | MemoryError) -> str:
    """What a row says where memory ran out; any other error is raised again."""
    if isinstance(error, BrokenProcessPool):
        return "its process died, as it does where memory runs out"
    if isinstance(error, MemoryError) or MEMORY_RAN_OUT.search(str(error)):
        return f"does not fit in memory: {short(error)}"
    raise error


# ---- in the process of one size


def measure(job: Job) -> Measured:
    """The rows of one size: ours and, where asked for, PyTorch's."""
    cache.enable()
    config = prepared(job)
    source = find_source(config)
    networks, params = random_model(config) if source is None else own_model(config)
    length = config.train.steps_per_dispatch or (1 if on_cpu() else ACCELERATOR_STEPS_PER_DISPATCH)
    repetitions = REPETITIONS if job.steps is None else math.ceil(job.steps / length)
    peak, peak_from = matrix_peak(config.model.dtype)
    facts = {
        "platform": jax.default_backend(),
        "device": device_name(),
        "devices": jax.local_device_count(),
        "cores": cores(),
        "model": config.model.path or MINI.name,
        "weights": "random" if source is None else "its own",
        "dtype": config.model.dtype,
        "peak": peak_from,
        "config": plain(config),
    }
    builders = {OURS: partial(ours, config, networks, params, length, peak)}
    if job.vs_torch:
        configs = RANDOM if source is None else {name: source.config(name) for name in source.components}
        path = config_lib.expand(config.model.path) if config.model.path else MINI
        folder = path if path.is_dir() else None
        facts["torch"], theirs = torch_bench.builders(config, configs, folder, jax.default_backend(), cores())
        builders |= theirs
    rows, dispatches = {}, {}
    for what, build in builders.items():
        row = Row(what, job.concepts, job.batch, steps_per_dispatch=length, repetitions=repetitions)
        try:
            rows[what], dispatches[what] = build(row)
        except (RuntimeError, MemoryError) as error:
            rows[what] = replace(row, error=of_memory(error))
    for what, seconds in take_turns(dispatches, repetitions).items():
        rows[what] = with_times(rows[what], seconds, config.train.steps)
    return Measured(facts, with_ratios(list(rows.values())), networks, config)


def prepared(job: Job) -> ConfigDict:
    """The config of one size; what a run needs besides a model and its setting is of no account here."""
    if job.config is None:
        config = config_lib.default() if on_cpu() else config_lib.stable_diffusion(SD15)
    else:
        config = job.config
    config.train.batch_size = job.batch
    for section, key in ((config, "run_dir"), (config.data, "dir"), (config.concept, "class_word")):
        section[key] = section[key] or "none"
    config_lib.check(config)
    return config


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def cores() -> int:
    """Those that this process may use, as XLA's and PyTorch's thread pools have it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def device_name() -> str:
    """JAX calls every processor `cpu`."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if on_cpu() and platform.system() == "Linux" else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else jax.local_devices()[0].device_kind


def matrix_peak(dtype: str) -> tuple[float | None, str]:
    """FLOP/s of large matrix products on one device, or on all cores; None where nobody knows; and where that number
    comes from."""
    if on_cpu():
        return measured_peak(), f"measured: the best of a few {PRODUCT} x {PRODUCT} float32 matrix products"
    kind = jax.local_devices()[0].device_kind
    rates = [rate for pattern, rate in PEAKS.items() if re.fullmatch(pattern, kind)]
    if dtype != "bfloat16" or not rates:
        return None, f"not known for {dtype} on {kind}"
    return rates[0], f"data sheet: {rates[0] / 1e12:.0f} TFLOP/s {dtype} per device"


def measured_peak() -> float:
    matrix = jnp.ones((PRODUCT, PRODUCT), jnp.float32)
    product = jax.jit(jnp.matmul)
    seconds = take_turns({"": lambda: product(matrix, matrix).block_until_ready()}, 1 + REPETITIONS)[""]
    return 2 * PRODUCT**3 / min(seconds[1:])  # the first one compiles


def take_turns(dispatches: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each repetition. The contenders take turns, so that other work on the machine is fair to all."""
    seconds: dict[str, list[float]] = {what: [] for what in dispatches}
    for _ in range(repetitions):
        for what, dispatch in dispatches.items():
            start = time.perf_counter()
            dispatch()
            seconds[what].append(time.perf_counter() - start)
    return seconds


# ---- what is measured


def find_source(config: ConfigDict) -> Source | None:
    """The model that the config names, where it is on the disk; None where random weights stand in for it."""
    model = config.model
    try:
        return open_source(model.path or str(MINI), model.revision, model.variant, model.prediction_type)
    except UserError:
        if model.path in RANDOM_FOR:
            return None
        raise


def own_model(config: ConfigDict) -> tuple[Networks, dict[str, Any]]:
    pipeline = load_model(config)
    return pipeline.networks, pipeline.params


def random_model(config: ConfigDict) -> tuple[Networks, dict[str, Any]]:
    """Stable Diffusion 1.x of random weights, made on the device; no VAE's: the step does not need it."""
    dtype = DTYPES[config.model.dtype]
    text_encoder, unet, vae = (COMPONENTS[name].make(of_part, dtype) for name, of_part in RANDOM.items())
    schedule = NoiseSchedule.from_json(ldm.FAMILIES[0].scheduler)
    params = {
        "text": (random_params(abstract("text", text_encoder), dtype),),
        "unet": random_params(abstract("unet", unet), dtype),
    }
    return Networks((text_encoder,), unet, vae, schedule), params


def random_params(shapes: Params, dtype: Any) -> Params:
    """Weights that keep the activations' size, on the default device: one at a time, so that making them needs no more
    memory than they take."""
    key = jax.random.key(0, impl="rbg")
    count = itertools.count()
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: random_param(jax.random.fold_in(key, next(count)), path[-1].key, leaf.shape, dtype), shapes
    )


@partial(jax.jit, static_argnames=("name", "shape", "dtype"))
def random_param(key: Key[Array, ""], name: str, shape: tuple[int, ...], dtype: Any) -> Float[Array, "..."]:
    fixed = {"scale": jnp.ones, "bias": jnp.zeros}
    if name in fixed:
        return fixed[name](shape, dtype)
    limit = math.sqrt(3 / math.prod(shape[:-1]))
    return jax.random.uniform(key, shape, dtype, -limit, limit)


def make_step_config(config: ConfigDict, networks: Networks, concepts: int) -> StepConfig:
    return StepConfig(
        networks=networks,
        adapter=config_lib.adapter_config(config, networks),
        optimizer=config_lib.optimizer_config(config),
        batch_size=config.train.batch_size,
        mesh=make_mesh(concepts, config.train.batch_size),
    )


def start(config: ConfigDict, step_config: StepConfig, concepts: int) -> TrainState:
    seeds = range(config.seed, config.seed + concepts)
    heads = step_config.networks.heads
    return init_state(seeds, step_config.adapter, heads, step_config.optimizer.transformation())


def random_data(
    config: ConfigDict, step_config: StepConfig, text_params: tuple[Params, ...], concepts: int
) -> ConceptData:
    """What `train.prepare` gives for PHOTOS photos, of random numbers. `text_params` may be shapes."""
    rng, networks = np.random.default_rng(0), step_config.networks
    templates = len(config.concept.templates)

    def draw(leaf) -> np.ndarray:
        shape = (concepts, *leaf.shape)
        real = jnp.issubdtype(leaf.dtype, jnp.floating)
        return (rng.standard_normal(shape, np.float32) if real else np.ones(shape)).astype(leaf.dtype)

    def prompts(encoder: CLIPTextModel, params: Params, stop: int) -> text.Prompts:
        ids = jax.ShapeDtypeStruct((bucket(templates), encoder.config.max_position_embeddings), jnp.int32)
        visible = jax.ShapeDtypeStruct(ids.shape, bool)
        lower = partial(text.lower, encoder, stop=stop)
        return jax.tree.map(draw, jax.eval_shape(lower, params, ids, visible))

    views = jax.ShapeDtypeStruct((bucket(PHOTOS), 1 + config.data.flip, *networks.latent_shape), jnp.float32)
    firsts = [layers[0] for layers in step_config.adapter.layers]
    return ConceptData(
        mean=draw(views),
        std=np.abs(draw(views)) / 10,
        photos=np.full(concepts, PHOTOS, np.int32),
        prompts=tuple(prompts(*of_one) for of_one in zip(networks.text, text_params, firsts, strict=True)),
        prompt_count=np.full(concepts, templates, np.int32),
        steps=np.full(concepts, config.train.steps, np.int32),
    )


def ours(
    config: ConfigDict,
    networks: Networks,
    params: dict[str, Any],
    length: int,
    peak: float | None,
    row: Row,
) -> tuple[Row, Callable[[], object]]:
    """The step, compiled twice and warmed up: the row with all but its times, and a dispatch of `length` steps."""
    step_config = make_step_config(config, networks, row.concepts)
    mesh = step_config.mesh
    frozen = Frozen(params["unet"], params["text"], networks.schedule.alphas_cumprod)
    frozen = jax.device_put(frozen, sharding(mesh, "frozen"))
    data = random_data(config, step_config, params["text"], row.concepts)
    data, state = jax.device_put((data, start(config, step_config, row.concepts)), sharding(mesh, "concept"))

    with empty_cache():
        trace_s, compile_cold_s, _, step = timed_compile(step_config, length, state, frozen, data)
        jax.clear_caches()
        _, compile_cached_s, hits, _ = timed_compile(step_config, length, state, frozen, data)
    cost, memory = step.cost_analysis(), step.memory_analysis()
    more = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    if on_cpu():
        check_free(more)

    def dispatch() -> None:
        nonlocal state
        state, metrics = step(state, frozen, data)
        jax.block_until_ready((state, metrics))

    for _ in range(WARM_UP):
        dispatch()
    held = [device.memory_stats() for device in mesh.devices.flat]
    on_device = all(stats and "peak_bytes_in_use" in stats for stats in held)
    row = replace(
        row,
        devices=mesh.size,
        trace_s=trace_s,
        compile_cold_s=compile_cold_s,
        compile_cached_s=compile_cached_s if hits else None,
        bytes_per_step=cost["bytes accessed"] * mesh.size,
        peak_flops_per_s=peak and peak * (1 if on_cpu() else mesh.size),
        peak_memory_bytes=(
            max(stats["peak_bytes_in_use"] for stats in held) if on_device else more + memory.argument_size_in_bytes
        ),
        peak_memory_from="device" if on_device else "program",
    )
    return with_flops(row, cost["flops"] * mesh.size if on_cpu() else None), dispatch


def check_free(more: int) -> None:
    """Raise MemoryError where the system would end a process that asks for so many bytes more."""
    free = psutil.virtual_memory().available
    if more > free:
        raise MemoryError(f"{more / 2**30:.1f} GiB more are needed, {free / 2**30:.1f} GiB are free")


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """A persistent compilation cache of its own, with nothing in it."""
    before = jax.config.jax_compilation_cache_dir
    with tempfile.TemporaryDirectory() as folder:
        use_cache(folder)
        try:
            yield
        finally:
            use_cache(before)


def use_cache(folder: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # it looks at its folder once


def timed_compile(step_config: StepConfig, length: int, *inputs) -> tuple[float, float, int, Any]:
    """Seconds of tracing and of compiling, hits of the persistent cache, and the compiled program."""
    hits = []

    def listen(event: str, **_) -> None:
        if cache.EVENTS.get(event) == "hits":
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    begin = time.perf_counter()
    lowered = compile_chunk(step_config, length).lower(*inputs)
    traced = time.perf_counter()
    step = lowered.compile()
    return traced - begin, time.perf_counter() - traced, len(hits), step


def count_flops(job: Job, config: ConfigDict, networks: Networks) -> float:
    """Of one step lowered for a CPU, where nothing is a library's; nothing is loaded or compiled. To be called in a
    process that has used no device yet."""
    jax.config.update("jax_platforms", "cpu")
    dtype = DTYPES[config.model.dtype]

    def shapes(name: str, module) -> Params:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract(name, module))

    step_config = make_step_config(config, networks, job.concepts)
    of_text = tuple(shapes("text", encoder) for encoder in networks.text)
    frozen = Frozen(shapes("unet", networks.unet), of_text, networks.schedule.alphas_cumprod)
    data = random_data(config, step_config, of_text, job.concepts)
    lowered = compile_chunk(step_config, 1).lower(start(config, step_config, job.concepts), frozen, data)
    return lowered.cost_analysis()["flops"]


# ---- rows


def with_flops(row: Row, flops: float | None) -> Row:
    """The row with its FLOPs and what follows of them; its times, where it has any, are known already."""
    rate = flops and row.ms_per_step and flops / row.ms_per_step * 1e3
    return replace(
        row,
        flops_per_step=flops,
        flops_per_byte=flops and flops / row.bytes_per_step,
        utilisation=rate and row.peak_flops_per_s and rate / row.peak_flops_per_s,
    )


def with_times(row: Row, seconds: list[float], train_steps: int) -> Row:
    median, smallest = (pick(seconds) / row.steps_per_dispatch for pick in (statistics.median, min))
    images_per_s = row.concepts * row.batch / median
    timed = replace(
        row,
        ms_per_step=median * 1e3,
        ms_per_step_smallest=smallest * 1e3,
        images_per_s=images_per_s,
        concepts_per_hour=images_per_s * 3600 / (row.batch * train_steps),
    )
    return with_flops(timed, row.flops_per_step)


def with_ratios(rows: list[Row]) -> list[Row]:
    """Our times by theirs in their rows; the first row is ours."""
    first, *others = rows
    return [
        first,
        *(
            replace(
                row,
                ours_per_theirs=first.ms_per_step / row.ms_per_step,
                ours_per_theirs_smallest=first.ms_per_step_smallest / row.ms_per_step_smallest,
            )
            if first.ms_per_step and row.ms_per_step
            else row
            for row in others
        ),
    ]


def number(value: float | None, form: str, unit: float = 1) -> str:
    return "" if value is None else format(value / unit, form)


COLUMNS = {
    "concepts x batch": lambda row: f"{row.concepts}x{row.batch}",
    "what": lambda row: LABELS[row.what],
    "trace s": lambda row: number(row.trace_s, ".1f"),
    "compile s, cold": lambda row: number(row.compile_cold_s, ".1f"),
    "from the cache": lambda row: number(row.compile_cached_s, ".1f"),
    "ms/step": lambda row: row.error or number(row.ms_per_step, ".1f"),
    "smallest": lambda row: number(row.ms_per_step_smallest, ".1f"),
    "images/s": lambda row: number(row.images_per_s, ".1f"),
    "concepts/h": lambda row: number(row.concepts_per_hour, ".1f"),
    "GFLOP/step": lambda row: number(row.flops_per_step, ".1f", 1e9),
    "of the peak": lambda row: number(row.utilisation, ".1%"),
    "GB/step": lambda row: number(row.bytes_per_step, ".2f", 1e9),
    "FLOP/byte": lambda row: number(row.flops_per_byte, ".1f"),
    "peak GiB": lambda row: number(row.peak_memory_bytes, ".2f", 2**30),
    "by": lambda row: row.peak_memory_from or "",
    "ours/theirs": lambda row: number(row.ours_per_theirs, ".2f"),
    "of the smallest": lambda row: number(row.ours_per_theirs_smallest, ".2f"),
}


def to_table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [list(COLUMNS), ["---", "---"] + ["--:"] * (len(COLUMNS) - 2)]
    lines += [[cell(row) for cell in COLUMNS.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
