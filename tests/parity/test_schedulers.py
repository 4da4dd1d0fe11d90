"""The golden arrays of the schedulers are what the installed diffusers gives."""

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from catversion_jax.base import schedulers
from catversion_jax.base.noise_schedule import NoiseSchedule
from catversion_jax.base.trajectory import next_state
from tests import golden_schedulers


def test_golden_arrays():
    stored, now = np.load(golden_schedulers.PATH), golden_schedulers.arrays()
    np.testing.assert_array_equal(stored["cases"], now["cases"])
    for name in ("first_noise", "noise", "timesteps", "latents"):
        np.testing.assert_allclose(now[name], stored[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", [name for name in golden_schedulers.CLASSES if name not in ("pndm", "heun", "dpmpp_sde")]
)
def test_from_a_picture(name):
    """Steps left out at the beginning, from latents with as much noise, as in diffusers' image to image.

    Not PLMS: diffusers repeats the second call there although it is another timestep's. Not Heun
    and DPM++ SDE, whose timesteps are called twice: diffusers counts them from another one.
    """
    clean, noise = (torch.randn(golden_schedulers.SHAPE, generator=torch.Generator().manual_seed(i)) for i in (0, 2))
    class_name, changes = golden_schedulers.CLASSES[name]
    for _, config, steps in (case for case in golden_schedulers.cases() if case[0] == name):
        for skipped in {1, steps // 2, steps - 1} - {0, steps}:
            theirs = getattr(diffusers, class_name).from_config(config, **changes)
            theirs.set_timesteps(steps)
            timesteps = theirs.timesteps[skipped:]
            if hasattr(theirs, "set_begin_index"):
                theirs.set_begin_index(skipped)
            latents = theirs.add_noise(clean, noise, timesteps[:1])
            generator = torch.Generator().manual_seed(1)
            noisy = {"generator": generator} if class_name in golden_schedulers.NOISY else {}
            for timestep in timesteps:
                prediction = golden_schedulers.model(theirs.scale_model_input(latents, timestep), timestep)
                latents = theirs.step(prediction, timestep, latents, **noisy).prev_sample

            ours = schedulers.plan(NoiseSchedule.from_json(config), name, steps, skipped)
            np.testing.assert_allclose(ours.calls.timestep, timesteps.numpy(), rtol=1e-6, atol=1e-3)
            state, generator = ours.start(jnp.asarray(noise.numpy()), jnp.asarray(clean.numpy())), torch.Generator()
            generator.manual_seed(1)
            for call in range(len(timesteps)):
                fresh = torch.randn(golden_schedulers.SHAPE, generator=generator).numpy()
                guess = np.tanh(np.float32(0.8) * state[0] + ours.calls.timestep[call] / 1000)
                state = next_state(state, guess, jnp.asarray(fresh), ours.calls.update[call])
            error = float(np.abs(np.asarray(state[0]) - latents.numpy()).max())
            assert error < 1e-4, (config, steps, skipped)
