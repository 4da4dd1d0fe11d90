"""Our training step on random numbers of a run's shapes; the step needs neither photos nor a VAE."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax.base.pipeline import DTYPES, BasePipeline, Networks, abstract
from catversion_jax.base.text_states import PromptStates, lower_layers
from catversion_jax.bench.machine import check_free, on_cpu
from catversion_jax.bench.row import Row, with_flops
from catversion_jax.bench.timing import empty_cache, timed_compile
from catversion_jax.config import Config
from catversion_jax.data.latents import bucket
from catversion_jax.models.clip import CLIPTextModel
from catversion_jax.models.sharding import sharding
from catversion_jax.training.state import ConceptData, Frozen
from catversion_jax.training.step import StepConfig, compile_chunk
from catversion_jax.utils.types import Params

WARM_UP = 2  # dispatches before the timed ones

PHOTOS = 5  # of each concept


def ours(
    config: Config, pipeline: BasePipeline, length: int, peak: float | None, row: Row
) -> tuple[Row, Callable[[], object]]:
    """Compiles the step twice and warms it up; returns the row without its times, and a dispatch of `length` steps."""
    step_config = StepConfig.of(config, pipeline.networks, row.concepts)
    mesh = step_config.mesh
    frozen = Frozen.of(pipeline, mesh, config.mesh.rules, step_config.method)
    data = random_data(config, step_config, frozen.text, row.concepts)
    state = step_config.init_state(range(row.concepts))
    data, state = jax.device_put((data, state), sharding(mesh, "concept"))

    with empty_cache():
        trace_s, compile_cold_s, _, step = timed_compile(step_config, length, state, frozen, data)
        # Forgets the traced and compiled step, so that the second compilation finds only the persistent cache.
        jax.clear_caches()
        _, compile_cached_s, hits, _ = timed_compile(step_config, length, state, frozen, data)
    cost, memory = step.cost_analysis(), step.memory_analysis()
    # Beyond the arguments: donated buffers are outputs too, but need no memory of their own.
    more = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    # On a CPU nothing refuses an allocation: the system would kill the process during the first dispatch.
    if on_cpu():
        check_free(more)

    def dispatch() -> None:
        # The step donates its state, so each dispatch has to start from the result of the one before.
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


def random_data(config: Config, step_config: StepConfig, text_params: tuple[Params, ...], concepts: int) -> ConceptData:
    """Returns random data in the shapes of `concept_data.prepare` for PHOTOS photos; `text_params` may be shapes."""
    rng, networks = np.random.default_rng(0), step_config.networks
    templates = len(config.concept.templates)

    def random(leaf) -> np.ndarray:
        shape = (concepts, *leaf.shape)
        real = jnp.issubdtype(leaf.dtype, jnp.floating)
        return (rng.standard_normal(shape, np.float32) if real else np.ones(shape)).astype(leaf.dtype)

    def prompts(encoder: CLIPTextModel, params: Params, stop: int) -> PromptStates:
        ids = jax.ShapeDtypeStruct((bucket(templates), encoder.config.max_position_embeddings), jnp.int32)
        token_mask = jax.ShapeDtypeStruct((*ids.shape, 1), bool)
        lower = partial(lower_layers, encoder, stop=stop)
        return jax.tree.map(random, jax.eval_shape(lower, params, ids, token_mask))

    firsts, weighs = step_config.method.first_layers(networks), bool(step_config.method.prior_weight)

    def images(count: int, views: int) -> ConceptData:
        shape = jax.ShapeDtypeStruct((bucket(count), views, *networks.latent_shape), jnp.float32)
        return ConceptData(
            mean=random(shape),
            std=np.abs(random(shape)) / 10,
            photos=np.full(concepts, count, np.int32),
            prompts=tuple(prompts(*of_one) for of_one in zip(networks.text, text_params, firsts, strict=True)),
            first_prompt=np.zeros((concepts, bucket(count)), np.int32),
            prompt_count=np.full((concepts, bucket(count)), templates, np.int32),
            steps=np.full(concepts, config.train.steps, np.int32),
            weight=np.ones((concepts, *shape.shape[:-1], 1), np.float32) if weighs else None,
        )

    prior = images(config.prior.pictures, 1) if weighs else None
    return images(PHOTOS, 1 + config.data.flip).replace(prior=prior)


def count_flops(config: Config, networks: Networks, concepts: int) -> float:
    """Returns the FLOPs of one step lowered for one CPU, where no operation is a library call.

    Nothing is loaded or compiled. It has to be called in a process that has used no device yet.
    """
    jax.config.update("jax_platforms", "cpu")
    config = config.replaced({"mesh.fsdp": 1, "mesh.tensor": 1})
    dtype = DTYPES[config.model.dtype]
    step_config = StepConfig.of(config, networks, concepts)
    of_text = tuple(abstract("text", encoder, dtype, step_config.mesh) for encoder in networks.text)
    unet = abstract("unet", networks.unet, dtype, step_config.mesh)
    frozen = Frozen(unet, of_text, networks.schedule.alphas_cumprod)
    data = random_data(config, step_config, of_text, concepts)
    state = step_config.init_state(range(concepts))
    lowered = compile_chunk(step_config, 1).lower(state, frozen, data)
    return lowered.cost_analysis()["flops"]
