"""The schedulers by name, and which of them a model's scheduler_config.json names."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from catversion_jax.base.noise_schedule import NoiseSchedule, check_choices
from catversion_jax.base.solvers import (
    FINAL_SIGMAS,
    SPACINGS,
    Options,
    ddim,
    dpmpp_2m,
    dpmpp_sde,
    euler,
    heun,
    lcm,
    pndm,
    unipc,
)
from catversion_jax.base.trajectory import Trajectory
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.json_config import from_json
from catversion_jax.utils.log import warn


class Scheduler(NamedTuple):
    diffusers: str  # the class that gives the same results
    plan: Callable[[NoiseSchedule, Options, int, int], Trajectory]
    defaults: dict[str, Any]  # the class's defaults for keys that scheduler_config.json lacks
    fixed: dict[str, Any]  # keys that the class reads, with the only value that is implemented here
    forced: dict[str, Any] = {}  # override scheduler_config.json
    webui: tuple[str, str] = ("", "")  # its name and its schedule's in AUTOMATIC1111's web UI


EULER_FIXED = {
    "interpolation_type": "linear",
    "sigma_max": None,
    "sigma_min": None,
    "timestep_type": "discrete",
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
}
SDE_FIXED = {"use_beta_sigmas": False, "use_exponential_sigmas": False}
HEUN_FIXED = SDE_FIXED | {"clip_sample": False}
DPM_FIXED = {
    "algorithm_type": "dpmsolver++",
    "lambda_min_clipped": -np.inf,
    "solver_order": 2,
    "solver_type": "midpoint",
    "thresholding": False,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": False,
    "use_lu_lambdas": False,
    "variance_type": None,
}
UNIPC_FIXED = {
    "disable_corrector": [],
    "predict_x0": True,
    "solver_order": 2,
    "solver_p": None,
    "thresholding": False,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": False,
}
LEADING, LINSPACE = {"timestep_spacing": "leading"}, {"timestep_spacing": "linspace"}
DPM, KARRAS = "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}
ANCESTRAL = {"final_sigmas_type": "zero", "use_karras_sigmas": False}  # the class reads neither key

SCHEDULERS = {
    "ddim": Scheduler(
        "DDIMScheduler",
        ddim,
        LEADING | {"set_alpha_to_one": True},
        {"clip_sample": False, "thresholding": False},
        webui=("DDIM", ""),
    ),
    "pndm": Scheduler("PNDMScheduler", pndm, LEADING, {"skip_prk_steps": True}, webui=("PLMS", "")),
    "euler": Scheduler("EulerDiscreteScheduler", euler, LINSPACE, EULER_FIXED, webui=("Euler", "")),
    "euler_ancestral": Scheduler(
        "EulerAncestralDiscreteScheduler", partial(euler, ancestral=True), LINSPACE, {}, ANCESTRAL, ("Euler a", "")
    ),
    "heun": Scheduler("HeunDiscreteScheduler", heun, LINSPACE, HEUN_FIXED, webui=("Heun", "")),
    "lcm": Scheduler("LCMScheduler", lcm, LEADING, {"clip_sample": False, "thresholding": False}, webui=("LCM", "")),
    "dpmpp_2m": Scheduler(DPM, dpmpp_2m, LINSPACE, DPM_FIXED, webui=("DPM++ 2M", "")),
    "dpmpp_2m_karras": Scheduler(DPM, dpmpp_2m, LINSPACE, DPM_FIXED, KARRAS, ("DPM++ 2M", "Karras")),
    "dpmpp_sde": Scheduler("DPMSolverSDEScheduler", dpmpp_sde, LINSPACE, SDE_FIXED, webui=("DPM++ SDE", "")),
    "unipc": Scheduler("UniPCMultistepScheduler", unipc, LINSPACE, UNIPC_FIXED, webui=("UniPC", "")),
}
"""The schedulers by name, as --scheduler takes them."""
NEAREST = {
    "DDPMScheduler": "ddim",
    "DEISMultistepScheduler": "dpmpp_2m",
    "DPMSolverSinglestepScheduler": "dpmpp_2m",
    "IPNDMScheduler": "pndm",
    "KDPM2AncestralDiscreteScheduler": "euler_ancestral",
    "KDPM2DiscreteScheduler": "heun",
    "LMSDiscreteScheduler": "euler",
    "SASolverScheduler": "dpmpp_2m",
    "TCDScheduler": "lcm",
}
"""Classes that published models name and that are not implemented, and what is taken in their place."""
OF_ALL = ("timestep_spacing", "steps_offset", "use_karras_sigmas")
"""Keys that mean the same to every class."""


def plan(schedule: NoiseSchedule, name: str, steps: int, skipped: int = 0) -> Trajectory:
    """Plans the trajectory of the scheduler `name`: a key of SCHEDULERS, or "" for the model's own.

    The first `skipped` steps are left out, for latents that are not noise alone.

    Raises UserError for an unknown name, and for settings in scheduler_config.json that are not implemented.
    """
    config = dict(schedule.sampling)
    class_name = config.get("_class_name")
    if not name and class_name in NEAREST:
        name = NEAREST[class_name]
        config = {key: config[key] for key in OF_ALL if key in config}
        tell_nearest(class_name, name)
    scheduler = SCHEDULERS.get(name) if name else own(config.get("_class_name"))
    if scheduler is None:
        raise UserError(f"scheduler={name}: no such scheduler; expected one of {', '.join(SCHEDULERS)}")
    config = scheduler.defaults | config | {"_class_name": scheduler.diffusers}
    options = from_json(Options, config, scheduler.fixed, **scheduler.forced)
    check_choices(options, {"timestep_spacing": SPACINGS, "final_sigmas_type": FINAL_SIGMAS})
    return scheduler.plan(schedule, options, steps, skipped)


@cache
def tell_nearest(class_name: str, name: str) -> None:
    """Warns, once, that another scheduler is taken than the one that a model names."""
    warn(f"scheduler_config.json: {class_name} is not implemented; {name} is taken; choose another with --scheduler")


def webui_name(name: str) -> tuple[str, str]:
    """Returns the names of a scheduler and of its schedule in AUTOMATIC1111's web UI; "" is a model's own."""
    return SCHEDULERS[name].webui if name else ("the model's own", "")


def check_options(schedule: NoiseSchedule) -> None:
    """Raises UserError if a value of scheduler_config.json has a wrong type, for any scheduler that may be chosen."""
    from_json(Options, {"timestep_spacing": "leading"} | dict(schedule.sampling), {})


def own(class_name: str | None) -> Scheduler:
    """The scheduler that a scheduler_config.json names. Raises UserError if it is not supported."""
    for scheduler in SCHEDULERS.values():
        if scheduler.diffusers == class_name:
            return scheduler
    raise UserError(
        f"scheduler_config.json: {class_name}: not supported; choose one of {', '.join(SCHEDULERS)} as "
        "scheduler (in a config: sample.scheduler)"
    )
