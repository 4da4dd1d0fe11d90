"""What diffusers' PyTorch schedulers compute, written to tests/golden/schedulers.npz.

Run in the environment of `make parity`: python -m tests.golden_schedulers
"""

import itertools
import json
from pathlib import Path

import diffusers
import numpy as np
import torch

PATH = Path(__file__).parent / "golden" / "schedulers.npz"
SHAPE = (1, 4, 4, 4)
MOST_CALLS = 99  # Heun calls twice for each of 50 but the last
CLASSES = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}

NOISY = ("EulerAncestralDiscreteScheduler", "LCMScheduler")
BASE = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "trained_betas": None,
}
SD15 = BASE | {"_class_name": "PNDMScheduler", "set_alpha_to_one": False, "skip_prk_steps": True}
SD21 = SD15 | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
SDXL = SD15 | {
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
"""scheduler_config.json of Stable Diffusion 1.4 and 1.5, 2.1, and XL."""

OTHERS = [
    (name, BASE | {"prediction_type": prediction} | change, steps)
    for prediction in ("epsilon", "v_prediction")
    for name, change, steps in [
        ("ddim", {"beta_schedule": "linear"}, 20),
        ("ddim", {"set_alpha_to_one": True, "steps_offset": 0}, 7),
        ("pndm", {"set_alpha_to_one": True, "steps_offset": 0}, 7),
        ("pndm", {}, 1),
        ("pndm", {}, 2),
        ("euler", {"use_karras_sigmas": True}, 20),
        ("euler", {"use_karras_sigmas": True, "timestep_spacing": "leading"}, 7),
        ("euler", {"final_sigmas_type": "sigma_min", "timestep_spacing": "leading"}, 7),
        ("euler_ancestral", {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}, 7),
        ("heun", {"use_karras_sigmas": True}, 20),
        ("heun", {"use_karras_sigmas": True, "timestep_spacing": "leading"}, 7),
        ("heun", {}, 1),
        ("lcm", {}, 1),
        ("lcm", {}, 4),
        ("lcm", {"original_inference_steps": 100, "timestep_scaling": 3.0}, 60),
        ("dpmpp_2m", {}, 1),
        ("dpmpp_2m", {"use_karras_sigmas": True}, 7),
        ("dpmpp_2m", {"final_sigmas_type": "sigma_min"}, 7),
        ("dpmpp_2m", {"final_sigmas_type": "sigma_min"}, 20),
        ("dpmpp_2m", {"final_sigmas_type": "sigma_min", "lower_order_final": False}, 7),
        ("dpmpp_2m", {"final_sigmas_type": "sigma_min", "euler_at_final": True}, 20),
        ("dpmpp_2m_karras", {"final_sigmas_type": "sigma_min"}, 20),
        ("dpmpp_sde", {"use_karras_sigmas": True}, 20),
        ("dpmpp_sde", {"use_karras_sigmas": True, "timestep_spacing": "leading"}, 7),
        ("dpmpp_sde", {}, 1),
        ("unipc", {}, 1),
        ("unipc", {}, 2),
        ("unipc", {"use_karras_sigmas": True}, 20),
        ("unipc", {"final_sigmas_type": "sigma_min"}, 20),
        ("unipc", {"final_sigmas_type": "sigma_min", "lower_order_final": False}, 7),
        ("unipc", {"solver_type": "midpoint"}, 7),
    ]
]


def cases() -> list[tuple[str, dict, int]]:
    """Scheduler ("": the config's own), scheduler_config.json and number of steps."""
    spacings = ({}, *({"timestep_spacing": spacing} for spacing in ("leading", "linspace", "trailing")))
    grid = itertools.product(CLASSES, (SD15, SD21), spacings, (7, 20, 50))
    return [
        *((name, config | spacing, steps) for name, config, spacing, steps in grid),
        *OTHERS,
        *(("", config, 20) for config in (SD15, SD21, SDXL)),
    ]


def model(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Stands for the UNet: bounded, and neither linear nor the same at all timesteps."""
    return torch.tanh(0.8 * latents + timestep / 1000)


class Brownian:
    """Stands for diffusers' sampler of noise: what is drawn for a whole step goes on from what its first half got."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.half = None

    def __call__(self, sigma: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        fresh = torch.randn(SHAPE, generator=self.generator)
        if self.half is None or not torch.isclose(self.half[0], sigma):
            self.half = (sigma, to, fresh)
            return fresh
        _, middle, first = self.half
        self.half = None
        return ((sigma - middle).sqrt() * first + (middle - to).sqrt() * fresh) / (sigma - to).sqrt()


def sample(name: str, config: dict, steps: int, first_noise: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The timesteps and the last latents; the noise of a step is the next that the generator gives."""
    class_name, changes = CLASSES[name] if name else (config["_class_name"], {})
    scheduler = getattr(diffusers, class_name).from_config(config, **changes)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(1)
    noisy = {"generator": generator} if class_name in NOISY else {}
    if class_name == "DPMSolverSDEScheduler":
        scheduler.noise_sampler = Brownian(generator)
    latents = first_noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        prediction = model(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(prediction, timestep, latents, **noisy).prev_sample
    return scheduler.timesteps.numpy(), latents.numpy()


def arrays() -> dict[str, np.ndarray]:
    """Cases as JSON, the first noise, that of each call, and for each case its timesteps, end to end, and latents."""
    first_noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    timesteps, latents = zip(*(sample(*case, first_noise) for case in cases()), strict=True)
    return {
        "cases": np.array([json.dumps(case) for case in cases()]),
        "first_noise": first_noise.numpy(),
        "noise": np.stack([torch.randn(SHAPE, generator=generator).numpy() for _ in range(MOST_CALLS)]),
        "timesteps": np.concatenate(timesteps).astype(np.float32),
        "latents": np.stack(latents),
    }


if __name__ == "__main__":
    np.savez_compressed(PATH, **arrays())
    print(f"{PATH}: {PATH.stat().st_size} bytes, {len(cases())} cases, diffusers {diffusers.__version__}")
