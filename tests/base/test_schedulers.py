"""Our schedulers against the latents that diffusers' give (0.39, PyTorch), and what they refuse."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catversion_jax.base import noise_schedule, schedulers, solvers
from catversion_jax.base.noise_schedule import NoiseSchedule
from catversion_jax.base.sampler_config import SamplerConfig
from catversion_jax.base.trajectory import Trajectory, next_state, signal
from catversion_jax.models.unet import Context
from catversion_jax.sampling import denoising, sampler
from catversion_jax.utils.errors import UserError
from tests.conftest import max_error

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "schedulers.npz"))
CASES = [json.loads(case) for case in GOLDEN["cases"]]
STEP = jax.jit(next_state)
TOLERANCE = 1e-4


def run(trajectory: Trajectory) -> np.ndarray:
    """The last latents with the golden arrays' noise and stand-in for the UNet."""
    state = trajectory.start(jnp.asarray(GOLDEN["first_noise"]))
    for index, timestep, update, _ in zip(*trajectory.calls, strict=True):
        state = STEP(state, np.tanh(np.float32(0.8) * state[0] + timestep / 1000), GOLDEN["noise"][index], update)
    return np.asarray(state[0])


@pytest.mark.parametrize("name", [*schedulers.SCHEDULERS, ""])
def test_latents_are_those_of_diffusers(name):
    """Every spacing, epsilon and v-prediction, few and many steps."""
    timesteps, errors = GOLDEN["timesteps"], {}
    for (case, config, steps), expected in zip(CASES, GOLDEN["latents"], strict=True):
        trajectory = schedulers.plan(NoiseSchedule.from_json(config), case, steps)
        calls = len(trajectory.calls.number)
        if case == name:
            np.testing.assert_allclose(trajectory.calls.timestep, timesteps[:calls], rtol=1e-6, atol=1e-3)
            errors[json.dumps([config, steps])] = float(np.abs(run(trajectory) - expected).max())
        timesteps = timesteps[calls:]
    assert len(timesteps) == 0
    worst = max(errors, key=errors.get)
    print(f"{name or 'own'}: {len(errors)} cases, max-abs error {errors[worst]:.1e} at {worst}")
    assert errors[worst] < TOLERANCE


@pytest.mark.parametrize(
    ("prediction_type", "rescaled"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
@pytest.mark.parametrize("name", ["ddim", "euler", "euler_ancestral", "dpmpp_2m", "dpmpp_sde", "unipc"])
def test_a_perfect_prediction_arrives(name, prediction_type, rescaled):
    """A predictor that knows the clean latents brings every scheduler to them."""
    rng = np.random.default_rng(0)
    clean, noise = (jnp.asarray(rng.normal(size=(2, 4, 4, 4)), jnp.float32) for _ in range(2))
    spacing = {"timestep_spacing": "trailing"} if rescaled else {}
    schedule = NoiseSchedule.from_json(
        {"prediction_type": prediction_type, "rescale_betas_zero_snr": rescaled} | spacing
    )
    trajectory = schedulers.plan(schedule, name, 10)
    timesteps, trained = np.arange(schedule.num_train_timesteps), solvers.trained_sigmas(schedule)
    first = np.float32(np.interp(trajectory.calls.timestep[0], timesteps, trained))
    state = trajectory.start(noise).at[0].set(signal(first) * (clean + first * noise))
    for _, timestep, update, _ in zip(*trajectory.calls, strict=True):
        alpha = jnp.full(2, signal(np.interp(timestep, timesteps, trained)) ** 2, jnp.float32)
        kept, ratio = jnp.sqrt(alpha[0]), jnp.sqrt(1 - alpha[0])
        target = noise_schedule.TARGETS[prediction_type](clean, (state[0] - kept * clean) / ratio, alpha)
        state = STEP(state, target, jnp.asarray(rng.normal(size=noise.shape), jnp.float32), update)
    assert max_error(state[0], clean) < 1e-3


ZERO_SNR = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}


def rescaled_alphas() -> np.ndarray:
    """As diffusers' rescale_zero_terminal_snr gives them, by way of betas, in float64."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    roots = np.sqrt(np.cumprod(1 - betas))
    first, last = roots[0], roots[-1]
    bars = ((roots - last) * first / (first - last)) ** 2
    return np.cumprod(np.concatenate([bars[:1], bars[1:] / bars[:-1]]))


def test_zero_terminal_snr():
    """The last timestep has no signal, exactly; the first keeps its own."""
    alphas = NoiseSchedule.from_json(ZERO_SNR).alphas_cumprod
    assert alphas[-1] == 0
    assert alphas[0] == pytest.approx(NoiseSchedule().alphas_cumprod[0], abs=1e-6)
    assert max_error(alphas, rescaled_alphas()) < 1e-6
    assert alphas.dtype == np.float32


def test_ddim_from_a_timestep_without_signal():
    """Against DDIM's own formulas, in float64, where the first alpha is 0."""
    alphas, steps = rescaled_alphas(), 10
    trajectory = schedulers.plan(NoiseSchedule.from_json(ZERO_SNR), "ddim", steps)
    timesteps = np.arange(1000, 0, -1000 / steps).round().astype(int) - 1
    np.testing.assert_array_equal(trajectory.calls.timestep, timesteps)
    assert alphas[timesteps[0]] == 0
    state, expected = trajectory.start(jnp.asarray(GOLDEN["first_noise"])), GOLDEN["first_noise"].astype(np.float64)
    for t, update in zip(timesteps, trajectory.calls.update, strict=True):
        prediction = np.tanh(0.8 * expected + t / 1000)
        alpha, to = alphas[t], alphas[t - 100] if t >= 100 else 1.0
        clean = np.sqrt(alpha) * expected - np.sqrt(1 - alpha) * prediction
        noise = np.sqrt(alpha) * prediction + np.sqrt(1 - alpha) * expected
        expected = np.sqrt(to) * clean + np.sqrt(1 - to) * noise
        state = STEP(state, np.tanh(np.float32(0.8) * state[0] + t / 1000), np.zeros_like(state[0]), update)
    assert max_error(state[0], expected) < 1e-3


@pytest.mark.parametrize("name", schedulers.SCHEDULERS)
def test_dispatches_give_the_same_latents(tiny_pipeline, name):
    """Calls in one loop and calls one at a time."""
    net, params = tiny_pipeline.networks, tiny_pipeline.params
    seeds = jnp.arange(2, dtype=jnp.uint32)
    context = Context(jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 77, 32)), jnp.float32))
    trajectory = schedulers.plan(net.schedule, name, 5)
    results = [
        denoising.denoise(
            params["unet"],
            trajectory.start(denoising.initial_latents(seeds, net.latent_shape)),
            denoising.Guided(seeds, context, jnp.float32(2.0)),
            trajectory,
            networks=net,
            at_once=n,
        )
        for n in (1, len(trajectory.calls.number))
    ]
    assert max_error(*results) < 1e-4


def test_noise_is_a_pictures_own(tiny_pipeline):
    """With Euler ancestral, which adds noise at each step: the same picture in any batch, another for another seed."""

    def sample(seeds, batch_size):
        config = SamplerConfig(4, 2.0, batch_size, "euler_ancestral")
        request = sampler.SampleRequest.every(["a teapot"], seeds, config)
        return np.stack(list(sampler.sample_images(tiny_pipeline, request))).astype(int)

    together, alone = sample([5, 6, 7], 3), sample([5, 6, 7], 1)
    assert max_error(together, alone) <= 1  # of 255: sums in another order may round to the next
    assert (together[0] != together[1]).any()


def test_each_calls_noise_is_new():
    seeds = jnp.arange(2, dtype=jnp.uint32)
    draws = [denoising.initial_latents(seeds, (4, 4, 4))]
    draws += [denoising.step_noise(seeds, index, (4, 4, 4)) for index in range(3)]
    correlation = np.corrcoef(np.concatenate(draws).reshape(8, -1))
    assert np.abs(correlation - np.eye(8)).max() < 0.5


@pytest.mark.parametrize(
    ("config", "name", "steps", "message"),
    [
        ({}, "ipndm", 5, "scheduler=ipndm: no such scheduler; expected one of ddim, pndm, euler, euler_ancestral,"),
        ({"_class_name": "EDMEulerScheduler"}, "", 5, "EDMEulerScheduler: not supported; choose one of ddim,"),
        ({}, "", 5, "scheduler_config.json: None: not supported"),
        ({"clip_sample": True}, "ddim", 5, "DDIMScheduler: not supported: clip_sample=True (only False)"),
        ({"skip_prk_steps": False}, "pndm", 5, "PNDMScheduler: not supported: skip_prk_steps=False (only True)"),
        ({"interpolation_type": "log_linear"}, "euler", 5, "interpolation_type='log_linear' (only 'linear')"),
        ({"solver_order": 3}, "dpmpp_2m", 5, "DPMSolverMultistepScheduler: not supported: solver_order=3 (only 2)"),
        ({"solver_type": "bh1"}, "unipc", 5, "scheduler_config.json: not supported: solver_type='bh1' (only 'bh2')"),
        ({"timestep_spacing": "log"}, "ddim", 5, "timestep_spacing='log': expected one of leading, linspace, trailing"),
        ({"final_sigmas_type": "one"}, "euler", 5, "final_sigmas_type='one': expected one of zero, sigma_min"),
        ({}, "lcm", 51, "steps: 51; lcm takes at most the 50"),
        ({}, "ddim", 1000, "steps: more than 1000 timesteps give with spacing 'leading'; use fewer"),
        ({"trained_betas": [0.1]}, "ddim", 5, "not supported: trained_betas=[0.1] (only None)"),
        ({"beta_schedule": "sigmoid"}, "ddim", 5, "beta_schedule='sigmoid': expected one of scaled_linear, linear"),
        ({"prediction_type": "sample"}, "ddim", 5, "prediction_type='sample': expected one of epsilon, v_prediction"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(config, name, steps, message):
    with pytest.raises(UserError) as error:
        schedulers.plan(NoiseSchedule.from_json(config), name, steps)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_with_another_scheduler_can_be_trained_on_and_drawn_from():
    schedule = NoiseSchedule.from_json({"_class_name": "LMSDiscreteScheduler", "prediction_type": "v_prediction"})
    assert schedule.prediction_type == "v_prediction"
    assert len(schedulers.plan(schedule, "ddim", 5).calls.number) == 5


@pytest.mark.parametrize(("class_name", "name"), schedulers.NEAREST.items())
def test_the_nearest_is_taken(class_name, name, caplog):
    """Whatever the class's own keys say, and with one warning in a process."""
    schedulers.tell_nearest.cache_clear()
    shared = {"timestep_spacing": "trailing", "use_karras_sigmas": False}
    config = {"_class_name": class_name, "solver_order": 3, "solver_type": "bh2", "clip_sample": True} | shared
    found, _ = (schedulers.plan(NoiseSchedule.from_json(config), "", 7) for _ in range(2))
    expected = schedulers.plan(NoiseSchedule.from_json(shared), name, 7)
    np.testing.assert_array_equal(found.calls.update, expected.calls.update)
    np.testing.assert_array_equal(found.calls.timestep, expected.calls.timestep)
    (warning,) = caplog.messages
    assert warning.startswith(f"scheduler_config.json: {class_name} is not implemented; {name} is taken")
