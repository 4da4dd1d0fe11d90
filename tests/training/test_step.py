"""The compiled step: one trace, the same numbers however it is dispatched, split or stacked."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from catversion_jax.base.text_states import PromptStates
from catversion_jax.data.latents import bucket, pad
from catversion_jax.methods.catversion import CatVersion
from catversion_jax.models.sharding import make_mesh, sharding
from catversion_jax.models.unet import UNet2DConditionModel
from catversion_jax.training import step as ts
from catversion_jax.training.state import ConceptData, Frozen

BATCH = 4


def step_config(pipeline, devices, **optimizer) -> ts.StepConfig:
    method = CatVersion(((1, 2, 3),), length=2, init_std=0.1)
    return ts.StepConfig(
        pipeline.networks, method, ts.OptimizerConfig(**optimizer), BATCH, make_mesh(1, BATCH, devices=list(devices))
    )


def concept(photos: int, seed: int = 0, size: int | None = None) -> ConceptData:
    """Random posteriors and text states in the tiny model's shapes, with a concept axis of 1."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(photos, 2, 8, 8, 4)).astype(np.float32)
    hidden = rng.normal(size=(2, 77, 32)).astype(np.float32)
    data = ConceptData(
        mean=pad(mean, size or bucket(photos)),
        std=pad(np.abs(mean) / 10, size or bucket(photos)),
        photos=np.int32(photos),
        prompts=(PromptStates(pad(hidden, 8), pad(np.ones((2, 77, 1), bool), 8), np.full(8, 5, np.int32)),),
        first_prompt=np.zeros(3, np.int32),
        prompt_count=np.full(3, 2, np.int32),
        steps=np.int32(10),
    )
    return jax.tree.map(lambda x: np.asarray(x)[None], data)


def stack(*trees):
    return jax.tree.map(lambda *xs: np.concatenate(xs), *trees)


def start(config: ts.StepConfig, seeds=(0,)):
    return config.init_state(list(seeds))


@pytest.fixture(scope="module")
def frozen(tiny_pipeline) -> Frozen:
    p = tiny_pipeline
    return Frozen(p.params["unet"], p.params["text"], jnp.asarray(p.networks.schedule.alphas_cumprod))


@pytest.fixture(scope="module")
def config(tiny_pipeline) -> ts.StepConfig:
    return step_config(tiny_pipeline, jax.devices()[:1])


def on_mesh(config, state, frozen, data):
    whole, split = sharding(config.mesh, "frozen"), sharding(config.mesh, "concept")
    return jax.device_put(state, split), jax.device_put(frozen, whole), jax.device_put(data, split)


def run(config, frozen, data, steps=3, state=None, length=1):
    """`steps` steps; returns the final state and the losses [steps, C]."""
    state = start(config) if state is None else state
    state, frozen, data = on_mesh(config, state, frozen, data)
    losses = []
    for _ in range(0, steps, length):
        state, metrics = ts.compile_chunk(config, length)(state, frozen, data)
        losses.append(np.asarray(metrics["loss"]))
    return jax.device_get(state), np.concatenate(losses)


def assert_close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4), a, b)


def test_one_trace_for_all_folders_of_a_bucket(tiny_pipeline, frozen, monkeypatch):
    traces = []
    draw = ts.draw_minibatch
    monkeypatch.setattr(ts, "draw_minibatch", lambda *args: traces.append(1) or draw(*args))
    config = step_config(tiny_pipeline, jax.devices()[:1], weight_decay=0.02)  # no other test's
    for photos in (1, 5, 8):
        run(config, frozen, concept(photos), steps=2)
    assert len(traces) == 1
    assert ts.compile_chunk(config, 1)._cache_size() == 1


def test_padding_changes_nothing(config, frozen):
    a, losses = run(config, frozen, concept(5))
    b, padded = run(config, frozen, concept(5, size=16))
    np.testing.assert_array_equal(losses, padded)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_several_steps_in_one_dispatch_give_the_same_numbers(config, frozen):
    a, losses = run(config, frozen, concept(5), steps=3)
    b, scanned = run(config, frozen, concept(5), steps=3, length=3)
    np.testing.assert_allclose(losses, scanned, rtol=1e-5)
    assert_close(a, b)


def test_layers_computed_again_give_the_same_numbers(config, frozen):
    networks = config.networks
    unet = UNet2DConditionModel(replace(networks.unet.config, remat=True))
    a, losses = run(config, frozen, concept(5), steps=2)
    b, again = run(replace(config, networks=replace(networks, unet=unet)), frozen, concept(5), steps=2)
    np.testing.assert_allclose(losses, again, rtol=1e-5)
    assert_close(a, b, atol=1e-4)


def test_two_devices_equal_one(tiny_pipeline, frozen, config):
    two = step_config(tiny_pipeline, jax.devices())
    assert dict(two.mesh.shape) == {"concept": 1, "data": 2, "fsdp": 1, "tensor": 1}
    a, losses = run(config, frozen, concept(5))
    b, split = run(two, frozen, concept(5))
    np.testing.assert_allclose(losses, split, rtol=1e-5)
    assert_close(a, b, atol=1e-4)  # AdamW amplifies the last bits of small gradients


def test_the_batch_is_really_split(tiny_pipeline, frozen):
    two = step_config(tiny_pipeline, jax.devices())
    compiled = ts.compile_chunk(two, 1).lower(*on_mesh(two, start(two), frozen, concept(5))).compile()
    first_convolution = re.search(r"f32\[(\d+),8,8,32\]\S* convolution", compiled.as_text())
    assert int(first_convolution[1]) == BATCH // 2


def test_stacked_concepts_equal_solo_runs(config, frozen):
    datas = [concept(5, seed=1), concept(8, seed=2)]
    solo = [run(config, frozen, data, state=start(config, [seed])) for data, seed in zip(datas, (7, 8), strict=True)]
    both, losses = run(config, frozen, stack(*datas), state=start(config, [7, 8]))
    for i, (state, alone) in enumerate(solo):
        np.testing.assert_allclose(losses[:, i], alone[:, 0], rtol=1e-5)
        np.testing.assert_allclose(both.learned["prefix"][i], state.learned["prefix"][0], atol=1e-4)


def test_not_finite_keeps_the_last_good_state(config, frozen):
    good, bad = concept(5, seed=1), concept(5, seed=2)
    before, _ = run(config, frozen, stack(good, bad), state=start(config, [1, 2]), steps=1)
    bad.mean[:] = np.nan
    after, losses = run(config, frozen, stack(good, bad), state=before, steps=2)
    assert list(after.step) == [3, 1]
    assert np.isnan(losses[:, 1]).all()
    assert np.isfinite(losses[:, 0]).all()
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[1], y[1]), after, before)
    assert np.abs(after.learned["prefix"][0] - before.learned["prefix"][0]).max() > 0


def test_draws_differ_by_step_and_seed_and_stay_within_the_photos(config):
    data = jax.tree.map(lambda x: x[0], concept(5))
    data = data.replace(mean=np.arange(16, dtype=np.float32).reshape(8, 2, 1, 1, 1) + 0 * data.mean, std=0 * data.std)
    data = jax.tree.map(jnp.asarray, data)

    states = start(config, [0, 1])
    draw_one = jax.jit(lambda state: ts.draw_minibatch(state, data, config))

    def draw(seed, step):
        return draw_one(jax.tree.map(lambda x: x[seed], states).replace(step=jnp.int32(step)))

    batches = [draw(seed, step) for seed in (0, 1) for step in range(20)]
    photos = {int(x) // 2 for batch in batches for x in batch.latents[:, 0, 0, 0]}
    flips = {int(x) % 2 for batch in batches for x in batch.latents[:, 0, 0, 0]}
    assert photos == set(range(5))
    assert flips == {0, 1}
    assert len({float(batch.noise[0, 0, 0, 0]) for batch in batches}) == len(batches)
    timesteps = np.concatenate([batch.timesteps for batch in batches])
    parts = np.sort(np.concatenate([(batch.timesteps // 250)[None] for batch in batches]), axis=1)
    np.testing.assert_array_equal(parts, np.tile(np.arange(4), (len(batches), 1)))  # one in each quarter
    assert timesteps.min() < 100
    assert timesteps.max() > 900
    np.testing.assert_array_equal(draw(0, 3).noise, draw(0, 3).noise)


def test_optimizer_is_optax_adamw(config):
    """Our per-concept schedule around AdamW at rate 1 gives what optax.adamw gives at that schedule."""
    optimizer = ts.OptimizerConfig(learning_rate=3e-2, decay="cosine", weight_decay=0.1)
    reference = optax.adamw(optax.cosine_decay_schedule(3e-2, 10), weight_decay=0.1)
    ours, theirs = (jnp.linspace(-1, 1, 12),) * 2
    ours_state, theirs_state = optimizer.transformation().init(ours), reference.init(theirs)
    for step in range(10):
        grad = jnp.sin(ours * (step + 1))
        update, ours_state = optimizer.transformation().update(grad, ours_state, ours)
        ours = ours + optimizer.learning_rate_at(jnp.asarray([step]), jnp.asarray([10]))[0] * update
        update, theirs_state = reference.update(grad, theirs_state, theirs)
        theirs = optax.apply_updates(theirs, update)
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(
    ("decay", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 0, [1, 0.8536, 0.5, 0.1464]),
        ("constant", 2, [0.5, 1, 1, 1]),
        ("linear", 2, [0.5, 1, 1, 0.5]),
    ],
)
def test_schedules(decay, warmup, expected):
    optimizer = ts.OptimizerConfig(learning_rate=1.0, decay=decay, warmup_steps=warmup)
    rates = optimizer.learning_rate_at(jnp.arange(4), jnp.full(4, 4))
    np.testing.assert_allclose(rates, expected, atol=1e-4)


def test_clipping():
    clipped = ts.OptimizerConfig(clip_norm=0.5, eps=1.0, b1=0.0, b2=0.0, weight_decay=0.0).transformation()
    grad = jnp.asarray([3.0, 4.0])
    update, _ = clipped.update(grad, clipped.init(grad), grad)
    bounded = 0.5 * grad / 5
    np.testing.assert_allclose(update, -bounded / (jnp.abs(bounded) + 1), rtol=1e-5)


def test_only_the_prefix_is_differentiated(config, frozen):
    """No array of a convolution kernel's shape is computed: the frozen weights have no gradient in the program."""
    text = ts.compile_chunk(config, 1).lower(start(config), frozen, concept(5)).as_text()
    produced = re.findall(r"stablehlo\.convolution.*-> tensor<([\dx]+)xf32>", text)
    assert produced
    assert all(not shape.startswith("3x3x") for shape in produced)


@pytest.mark.parametrize("length", [1, 3])
def test_the_host_is_not_in_the_loop(config, frozen, length):
    """A dispatch moves nothing between host and device, and its program calls nothing on the host."""
    state, frozen, data = on_mesh(config, start(config), frozen, concept(5))
    step = ts.compile_chunk(config, length)
    program = step.lower(state, frozen, data).as_text()
    assert not re.search("callback|infeed|outfeed|stablehlo.send|stablehlo.recv", program)
    state, _ = step(state, frozen, data)  # compiles
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(step(state, frozen, data))


@pytest.mark.parametrize("shares", [(0.0, 1.0), (0.65, 1.0), (0.3, 0.8), (0.999, 1.0), (0.9999, 1.0)])
def test_timesteps_are_of_the_range(tiny_pipeline, shares):
    """Evenly spread over it, in training and in the evaluations of early stopping; the whole schedule by default."""
    config = replace(step_config(tiny_pipeline, jax.devices()[:1]), timesteps=shares)
    data, state = (jax.tree.map(lambda x: jnp.asarray(x[0]), tree) for tree in (concept(5), start(config)))
    draw = jax.jit(jax.vmap(lambda step: ts.draw_minibatch(state.replace(step=step), data, config).timesteps))
    drawn = np.asarray(draw(jnp.arange(500)))
    low, high = min(999, round(shares[0] * 1000)), round(shares[1] * 1000)
    assert drawn.min() >= low
    assert drawn.max() < high
    assert drawn.mean() == pytest.approx((low + high - 1) / 2, abs=0.02 * (high - low) + 0.5)
    judged = np.asarray(ts.fixed_batch(data, config).timesteps)
    expected = low + (np.arange(8) + 0.5) * (high - low) / 8
    np.testing.assert_array_equal(judged, expected.astype(int))
    if shares == (0.0, 1.0):
        assert step_config(tiny_pipeline, jax.devices()[:1]) == config


def test_text_penalty(tiny_pipeline, frozen):
    """It adds the relative squared change of the text states; the base model's are those at strength 0."""
    plain = step_config(tiny_pipeline, jax.devices()[:1])
    penal = replace(plain, text_penalty=0.3)
    data, state = concept(5), start(plain)
    batch = jax.vmap(lambda state, data: ts.draw_minibatch(state, data, plain))(state, data)
    without, with_it = (
        np.asarray(ts.denoising_loss(state.learned, frozen, batch, config)) for config in (plain, penal)
    )
    learned = jax.tree.map(lambda x: x[0], state.learned)
    prompts = jax.tree.map(lambda x: x[0], batch.prompts)
    moved, base = (
        np.asarray(plain.method.condition(learned, prompts, frozen.text, plain.networks, strength).states, np.float64)
        for strength in (1.0, 0.0)
    )
    expected = 0.3 * np.square(moved - base).sum() / np.square(base).sum()
    assert expected > 1e-4
    np.testing.assert_allclose(with_it - without, [expected], rtol=1e-3)
