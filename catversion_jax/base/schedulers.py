"""Schedulers as data: for a number of steps, each one becomes a sequence of small matrices, one per call of the UNet.

DDIM, PLMS, Euler, Heun, LCM and DPM-Solver++ are linear in the latents, the UNet's predictions and fresh noise, with
coefficients that the host knows in advance. So one `step`, a matrix product, serves all of them: one compiled loop
without branches, whose state is one array. The rows of a matrix come from running the scheduler's formulas on unit
vectors instead of latents. Every scheduler is a DDIM step from one noise level to the next, with its own estimate of
the clean latents, so the formulas here are shorter than those in the papers. The results are those of the classes in
diffusers 0.39.
"""

# Notation: variable -> symbol in the papers
#   signal(sigma)        sqrt(alpha_t) of DDIM (Song et al. 2021), alpha_t of DPM-Solver++ (Lu et al. 2022)
#   sigma                sigma of Karras et al. 2022, noise to signal; sqrt((1 - alpha_t) / alpha_t) of DDIM
#   to                   the sigma that a step goes to
#   latents              x_t of DDIM: signal(sigma) * (clean + sigma * noise), of total variance one, as the UNet takes
#                        them; x of Karras et al. is latents / signal(sigma)
#   prediction           epsilon_theta, or v of Salimans and Ho 2022
#   clean                x_0 as predicted: f_theta of DDIM, D_theta of Karras et al., x_theta of DPM-Solver++
#   log(sigma / to)      h of DPM-Solver++: lambda = log(alpha_t / sigma_t) there is -log(sigma) here
#
# Example: DDIM, epsilon prediction. The state has one slot, the latents; the columns are latents, prediction and noise.
#   clean = latents / signal(sigma) - sigma * prediction
#   next  = signal(to) * (clean + to * prediction)
#         = signal(to) / signal(sigma) * latents + signal(to) * (to - sigma) * prediction
# With the unit vectors (1, 0, 0) as latents and (0, 1, 0) as prediction, the same formulas give the matrix's one row,
#   [signal(to) / signal(sigma), signal(to) * (to - sigma), 0]
# which for the first of 50 steps of Stable Diffusion 1.5 (timesteps 981 to 961) is [1.1229, -0.1233, 0]. A scheduler
# with a memory has a slot, and a row, for each thing that it remembers.

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from msgspec import Meta

from catversion_jax.base.noise_schedule import NoiseSchedule, check_choices
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.json_config import from_json
from catversion_jax.utils.log import warn
from catversion_jax.utils.types import AnyArray, Array, Float, Int


class Calls(NamedTuple):
    """The inputs of the UNet's calls, in order; a pytree to scan over."""

    number: Int[AnyArray, "calls"]
    timestep: Float[AnyArray, "calls"]
    update: Float[AnyArray, "calls slots slots+2"]  # `step`'s matrices
    to: Float[AnyArray, "calls"]  # the noise level that each call leads to


class Trajectory(NamedTuple):
    """From noise to latents. The state is a stack of slots: first the latents, then what the scheduler remembers."""

    scale: float  # of the initial noise, which has variance one
    sigma: float  # the noise level of the first call
    calls: Calls

    def start(
        self, noise: Float[Array, "B h w c"], clean: Float[Array, "B h w c"] | None = None
    ) -> Float[Array, "slots B h w c"]:
        """The state before the first call: noise alone, or clean latents with as much noise as the first call has."""
        slots = self.calls.update.shape[1]
        first = self.scale * noise if clean is None else noised(clean, noise, self.sigma)
        return jnp.zeros((slots, *noise.shape), noise.dtype).at[0].set(first)


def step(
    state: Float[Array, "slots B h w c"],
    prediction: Float[Array, "B h w c"],
    noise: Float[Array, "B h w c"],
    update: Float[AnyArray, "slots slots+2"],
) -> Float[Array, "slots B h w c"]:
    """Returns the next state, given the UNet's prediction for the latents in the first slot."""
    terms = jnp.concatenate([state, prediction[None], noise[None]])
    return jnp.einsum("st,tBhwc->sBhwc", update, terms, precision="highest")


def signal(sigma):
    return 1 / np.hypot(1, sigma)


def noised(clean: Float[Array, "B h w c"], noise: Float[Array, "B h w c"], sigma) -> Float[Array, "B h w c"]:
    """Returns clean latents with noise of a level, of total variance one."""
    return (clean + sigma * noise) / jnp.sqrt(1 + sigma * sigma)


CLEAN = {
    "epsilon": lambda prediction, latents, sigma: latents / signal(sigma) - sigma * prediction,
    "v_prediction": lambda prediction, latents, sigma: signal(sigma) * (latents - sigma * prediction),
}
"""prediction_type -> the clean latents, given the prediction."""


def move(clean, latents, sigma, to):
    """The DDIM step between noise levels (Song et al. 2021, eta = 0); the noise is what remains without `clean`."""
    return signal(to) * (clean + to / sigma * (latents / signal(sigma) - clean))


@dataclass(frozen=True)
class Options:
    """The keys of scheduler_config.json that choose a scheduler's noise levels."""

    timestep_spacing: str  # a key of SPACINGS
    steps_offset: Annotated[int, Meta(ge=0, le=1000)] = 1  # as the pipelines of Stable Diffusion set it
    set_alpha_to_one: bool = False
    final_sigmas_type: str = "zero"  # a key of FINAL_SIGMAS
    use_karras_sigmas: bool = False
    lower_order_final: bool = True
    euler_at_final: bool = False
    original_inference_steps: Annotated[int, Meta(ge=1, le=1000)] = 50  # of the model that LCM was distilled from
    timestep_scaling: Annotated[float, Meta(gt=0)] = 10.0


SPACINGS = {
    "leading": lambda total, steps, offset: np.arange(steps)[::-1] * (total // steps) + offset,
    "linspace": lambda total, steps, offset: np.linspace(0, total - 1, steps)[::-1],
    # [:steps]: for some numbers of steps, rounding makes arange one longer, with a timestep of -1.
    "trailing": lambda total, steps, offset: np.arange(total, 0, -total / steps)[:steps].round() - 1,
}
"""timestep_spacing -> descending timesteps (Lin et al. 2024, table 2)."""

FINAL_SIGMAS = {"zero": lambda trained: 0.0, "sigma_min": lambda trained: trained[0]}
"""final_sigmas_type -> the noise level that the last step goes to."""

KARRAS_RHO = 7
LEAST_ALPHA = 2.0**-24
FEW_CALLS = 15  # of the UNet; with fewer, lower_order_final applies
ADAMS_BASHFORTH = (
    (1,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def trained_sigmas(schedule: NoiseSchedule) -> Float[np.ndarray, "timesteps"]:
    """The noise level of each timestep, finite: where no signal is left (rescale_betas_zero_snr), 4096."""
    # As in diffusers' classes for Euler and DPM-Solver++. DDIM's takes the limit there, which the first step's estimate
    # of the clean latents misses by 2^-12 of the noise.
    alphas = np.maximum(schedule.alphas_cumprod.astype(np.float64), LEAST_ALPHA)
    return np.sqrt((1 - alphas) / alphas)


def spaced(schedule: NoiseSchedule, options: Options, steps: int) -> Float[np.ndarray, "steps"]:
    """Returns descending timesteps. Raises UserError if the spacing does not give that many."""
    total = schedule.num_train_timesteps
    timesteps = SPACINGS[options.timestep_spacing](total, steps, options.steps_offset).astype(np.float64)
    if timesteps[0] >= total or len(np.unique(timesteps.round())) < steps:
        raise UserError(f"steps: more than {total} timesteps give with spacing {options.timestep_spacing!r}; use fewer")
    return timesteps


def karras(sigmas: Float[np.ndarray, "n"], steps: int) -> Float[np.ndarray, "steps"]:
    """Returns noise levels from the largest to the smallest of `sigmas` (Karras et al. 2022, equation 5)."""
    first, last = np.array([sigmas.max(), sigmas.min()]) ** (1 / KARRAS_RHO)
    return np.linspace(first, last, steps) ** KARRAS_RHO


def to_timesteps(sigmas: Float[np.ndarray, "n"], trained: Float[np.ndarray, "timesteps"]) -> Float[np.ndarray, "n"]:
    return np.interp(np.log(sigmas), np.log(trained), np.arange(len(trained)))


def trajectory(timesteps, updates, levels: Sequence[tuple[float, float]], scale: float = 1.0) -> Trajectory:
    """`levels` are the noise levels of each call and of what it leads to."""
    timestep, update, to = (np.asarray(x, np.float32) for x in (timesteps, updates, [to for _, to in levels]))
    return Trajectory(
        float(scale), float(levels[0][0]), Calls(np.arange(len(levels), dtype=np.int32), timestep, update, to)
    )


def earlier(timesteps: np.ndarray, schedule: NoiseSchedule, options: Options, steps: int) -> np.ndarray:
    """The noise levels that DDIM's and PLMS's steps go to."""
    # As in diffusers, a fixed stride below each timestep, even if the timesteps are spaced differently.
    trained = trained_sigmas(schedule)
    timesteps = timesteps - schedule.num_train_timesteps // steps
    return np.where(timesteps >= 0, trained[timesteps], 0.0 if options.set_alpha_to_one else trained[0])


def ddim(schedule: NoiseSchedule, options: Options, steps: int, skipped: int = 0) -> Trajectory:
    """Song et al. 2021."""
    timesteps = spaced(schedule, options, steps).round().astype(int)[skipped:]
    levels = list(zip(trained_sigmas(schedule)[timesteps], earlier(timesteps, schedule, options, steps), strict=True))
    latents, prediction, _ = np.eye(3)
    clean = CLEAN[schedule.prediction_type]
    updates = [[move(clean(prediction, latents, s), latents, s, to)] for s, to in levels]
    return trajectory(timesteps, updates, levels)


def pndm(schedule: NoiseSchedule, options: Options, steps: int, skipped: int = 0) -> Trajectory:
    """PLMS (Liu et al. 2022) without the Runge-Kutta start. The UNet is called twice at the second timestep."""
    # As in diffusers' step_plms: the multi-step formula needs past predictions, of which there are none at the start.
    # The first call at the second timestep only improves the first step: that step is repeated, from its own latents
    # (the slot `first`), with the mean of both predictions (Heun's method).
    timesteps = spaced(schedule, options, steps).round().astype(int)[skipped:]
    timesteps = np.concatenate([timesteps[:2], timesteps[1:]])
    starts = timesteps.copy()
    starts[1:2] += schedule.num_train_timesteps // steps
    levels = list(zip(trained_sigmas(schedule)[starts], earlier(starts, schedule, options, steps), strict=True))
    latents, first, *past, prediction, _ = np.eye(7)
    clean = CLEAN[schedule.prediction_type]
    updates = []
    for i, (sigma, to) in enumerate(levels):
        if i == 1:
            source, mean, remembered = first, (prediction + past[0]) / 2, past
        else:
            weights = ADAMS_BASHFORTH[min(max(i, 1), len(ADAMS_BASHFORTH)) - 1]
            mean = np.sum([w * x for w, x in zip(weights, [prediction, *past], strict=False)], axis=0)
            source, remembered = latents, [prediction, *past[:2]]
        updates.append([move(clean(mean, source, sigma), source, sigma, to), source, *remembered])
    return trajectory(timesteps, updates, levels)


def in_karras_scale(
    schedule: NoiseSchedule, options: Options, steps: int, skipped: int
) -> tuple[Float[np.ndarray, "calls"], Float[np.ndarray, "calls"]]:
    """Returns the timesteps and noise levels of Euler's and Heun's steps, without those that are skipped."""
    trained = trained_sigmas(schedule)
    timesteps = spaced(schedule, options, steps)
    sigmas = np.interp(timesteps, np.arange(len(trained)), trained)
    if options.use_karras_sigmas:
        sigmas = karras(sigmas, steps)
        timesteps = to_timesteps(sigmas, trained)
    return timesteps[skipped:], sigmas[skipped:]


def first_scale(options: Options, sigmas: Float[np.ndarray, "calls"]) -> float:
    """Returns the scale of Euler's and Heun's initial noise."""
    # diffusers multiplies it by sigma, or by sqrt(1 + sigma^2) for "leading", in the scale of Karras et al.
    return 1.0 if options.timestep_spacing == "leading" else sigmas[0] * signal(sigmas[0])


def euler(
    schedule: NoiseSchedule, options: Options, steps: int, skipped: int = 0, ancestral: bool = False
) -> Trajectory:
    """Euler steps: Karras et al. 2022, algorithm 2 without churn and without its second-order correction.

    `ancestral` steps to a lower noise level and adds fresh noise, with the variance of the DDPM posterior.
    """
    timesteps, sigmas = in_karras_scale(schedule, options, steps, skipped)
    targets = np.append(sigmas[1:], FINAL_SIGMAS[options.final_sigmas_type](trained_sigmas(schedule)))
    latents, prediction, noise = np.eye(3)
    clean = CLEAN[schedule.prediction_type]
    updates = []
    for sigma, to in zip(sigmas, targets, strict=True):
        # down and up = sqrt(to^2 - down^2) are sigma_down and sigma_up of k-diffusion's get_ancestral_step at eta = 1:
        # up^2 = to^2 (sigma^2 - to^2) / sigma^2.
        down = to**2 / sigma if ancestral else to
        moved = move(clean(prediction, latents, sigma), latents, sigma, down) / signal(down)
        updates.append([signal(to) * (moved + np.sqrt(to**2 - down**2) * noise)])
    # diffusers keeps Euler's latents in the scale of Karras et al., where the signal has weight 1, and decodes the last
    # ones in that scale.
    updates[-1][0] /= signal(targets[-1])
    return trajectory(timesteps, updates, list(zip(sigmas, targets, strict=True)), first_scale(options, sigmas))


def dpmpp_2m(schedule: NoiseSchedule, options: Options, steps: int, skipped: int = 0) -> Trajectory:
    """Lu et al. 2022, DPM-Solver++, algorithm 2."""
    trained = trained_sigmas(schedule)
    if options.use_karras_sigmas:
        sigmas = karras(trained, steps)
        timesteps = to_timesteps(sigmas, trained).round()
    else:
        unused = options.timestep_spacing != "trailing"  # diffusers spaces one more timestep than it calls
        timesteps = spaced(schedule, options, steps + unused).round()[:steps]
        sigmas = trained[timesteps.astype(int)]
    timesteps = timesteps[skipped:]
    levels = list(pairwise(np.append(sigmas[skipped:], FINAL_SIGMAS[options.final_sigmas_type](trained))))
    lower = options.euler_at_final or (options.lower_order_final and steps < FEW_CALLS)
    lower_at_end = lower or options.final_sigmas_type == "zero"
    latents, past, prediction, _ = np.eye(4)
    updates = []
    for i, (sigma, to) in enumerate(levels):
        clean = ahead = CLEAN[schedule.prediction_type](prediction, latents, sigma)
        if i > 0 and not (i == len(levels) - 1 and lower_at_end):
            # D_i = (1 + 1 / (2 r_i)) x_theta(t_{i-1}) - 1 / (2 r_i) x_theta(t_{i-2}), where r_i = h_{i-1} / h_i.
            ahead = clean + np.log(sigma / to) / np.log(levels[i - 1][0] / sigma) / 2 * (clean - past)
        updates.append([move(ahead, latents, sigma, to), clean])
    return trajectory(timesteps, updates, levels)


def heun(schedule: NoiseSchedule, options: Options, steps: int, skipped: int = 0) -> Trajectory:
    """Karras et al. 2022, algorithm 1 without churn: an Euler step, corrected by the slope where it arrives."""
    timesteps, sigmas = in_karras_scale(schedule, options, steps, skipped)
    latents, source, slope, prediction, _ = np.eye(5)
    clean = CLEAN[schedule.prediction_type]
    called, updates, levels = [], [], []
    for i, (sigma, to) in enumerate(pairwise(np.append(sigmas, 0.0))):
        # Both slots are in the scale of Karras et al.
        first = latents / signal(sigma)
        down = (first - clean(prediction, latents, sigma)) / sigma
        called.append(timesteps[i])
        levels.append((sigma, to))
        updates.append([signal(to) * (first + (to - sigma) * down), first, down])
        if to > 0:
            arrived = (latents / signal(to) - clean(prediction, latents, to)) / to
            called.append(timesteps[i + 1])
            levels.append((to, to))
            updates.append([signal(to) * (source + (to - sigma) * (slope + arrived) / 2), source, slope])
    return trajectory(called, updates, levels, first_scale(options, sigmas))


SIGMA_DATA = 0.5
"""Of the boundary condition of LCM's consistency function."""


def lcm(schedule: NoiseSchedule, options: Options, steps: int, skipped: int = 0) -> Trajectory:
    """Luo et al. 2023, algorithm 3: the consistency function's estimate of the clean latents, and fresh noise on it."""
    original = options.original_inference_steps
    if steps > original:
        raise UserError(
            f"steps: {steps}; lcm takes at most the {original} that its model was distilled from; use fewer"
        )
    stride = schedule.num_train_timesteps // original
    taught = (np.arange(1, original + 1) * stride - 1)[::-1]
    timesteps = taught[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)][skipped:]
    sigmas = trained_sigmas(schedule)[timesteps]
    levels = list(pairwise(np.append(sigmas, 0.0)))
    latents, prediction, noise = np.eye(3)
    clean = CLEAN[schedule.prediction_type]
    updates = []
    for timestep, (sigma, to) in zip(timesteps, levels, strict=True):
        scaled = timestep * options.timestep_scaling
        skip, out = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2), scaled / np.hypot(scaled, SIGMA_DATA)
        estimate = out * clean(prediction, latents, sigma) + skip * latents
        updates.append([signal(to) * (estimate + to * noise)])
    return trajectory(timesteps, updates, levels)


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
HEUN_FIXED = {"clip_sample": False, "use_beta_sigmas": False, "use_exponential_sigmas": False}
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
}
"""The schedulers by name, as --scheduler takes them."""
NEAREST = {
    "DDPMScheduler": "ddim",
    "DEISMultistepScheduler": "dpmpp_2m",
    "DPMSolverSDEScheduler": "euler_ancestral",
    "DPMSolverSinglestepScheduler": "dpmpp_2m",
    "IPNDMScheduler": "pndm",
    "KDPM2AncestralDiscreteScheduler": "euler_ancestral",
    "KDPM2DiscreteScheduler": "heun",
    "LMSDiscreteScheduler": "euler",
    "SASolverScheduler": "dpmpp_2m",
    "TCDScheduler": "lcm",
    "UniPCMultistepScheduler": "dpmpp_2m",
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
