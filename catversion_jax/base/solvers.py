"""The schedulers' formulas: from noise levels to the matrices of a trajectory.

The rows of a matrix come from running a scheduler's formulas on unit vectors instead of latents. Every scheduler is a
DDIM step from one noise level to the next, with its own estimate of the clean latents, so the formulas here are shorter
than those in the papers. The results are those of the classes in diffusers 0.39.
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

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import numpy as np
from msgspec import Meta

from catversion_jax.base.noise_schedule import NoiseSchedule
from catversion_jax.base.trajectory import Calls, Trajectory, signal
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.types import Float

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
    solver_type: str = "bh2"
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
        estimate = clean(prediction, latents, sigma)
        if ancestral:
            moved = signal(to) * ancestral_step(estimate, latents / signal(sigma), noise, (sigma, to))
        else:
            moved = move(estimate, latents, sigma, to)
        updates.append([moved])
    # diffusers keeps Euler's latents in the scale of Karras et al., where the signal has weight 1, and decodes the last
    # ones in that scale.
    updates[-1][0] /= signal(targets[-1])
    return trajectory(timesteps, updates, list(zip(sigmas, targets, strict=True)), first_scale(options, sigmas))


def in_multistep(
    schedule: NoiseSchedule, options: Options, steps: int, skipped: int
) -> tuple[Float[np.ndarray, "calls"], list[tuple[float, float]]]:
    """Returns the timesteps of DPM-Solver++'s and UniPC's steps, and the noise levels before and after each."""
    trained = trained_sigmas(schedule)
    if options.use_karras_sigmas:
        sigmas = karras(trained, steps)
        timesteps = to_timesteps(sigmas, trained).round()
    else:
        unused = options.timestep_spacing != "trailing"  # diffusers spaces one more timestep than it calls
        timesteps = spaced(schedule, options, steps + unused).round()[:steps]
        sigmas = trained[timesteps.astype(int)]
    levels = pairwise(np.append(sigmas[skipped:], FINAL_SIGMAS[options.final_sigmas_type](trained)))
    return timesteps[skipped:], list(levels)


def dpmpp_2m(schedule: NoiseSchedule, options: Options, steps: int, skipped: int = 0) -> Trajectory:
    """Lu et al. 2022, DPM-Solver++, algorithm 2."""
    timesteps, levels = in_multistep(schedule, options, steps, skipped)
    lower = options.euler_at_final or (options.lower_order_final and steps < FEW_CALLS)
    lower_at_end = lower or options.final_sigmas_type == "zero"
    latents, past, prediction, _ = np.eye(4)
    updates = []
    for i, (sigma, to) in enumerate(levels):
        clean = ahead = CLEAN[schedule.prediction_type](prediction, latents, sigma)
        if i > 0 and not (i == len(levels) - 1 and lower_at_end):
            ahead = second_order(clean, past, (levels[i - 1][0], sigma, to))
        updates.append([move(ahead, latents, sigma, to), clean])
    return trajectory(timesteps, updates, levels)


def second_order(clean, past, levels: tuple[float, float, float]):
    """DPM-Solver++'s estimate of the clean latents for a step, from the last two of them."""
    # D_i = (1 + 1 / (2 r_i)) x_theta(t_{i-1}) - 1 / (2 r_i) x_theta(t_{i-2}), where r_i = h_{i-1} / h_i.
    before, sigma, to = levels
    return clean + np.log(sigma / to) / np.log(before / sigma) / 2 * (clean - past)


def unipc(schedule: NoiseSchedule, options: Options, steps: int, skipped: int = 0) -> Trajectory:
    """Zhao et al. 2023, UniPC-2 with B_2(h): each call first corrects the step that led to it, then takes the next."""
    if options.solver_type == "bh1":
        raise UserError("scheduler_config.json: not supported: solver_type='bh1' (only 'bh2')")
    timesteps, levels = in_multistep(schedule, options, steps, skipped)
    # `corrected` are the latents that the last step started from, `past` and `older` the clean ones of two calls.
    latents, corrected, past, older, prediction, _ = np.eye(6)
    updates, order = [], 1
    for i, (sigma, to) in enumerate(levels):
        clean = CLEAN[schedule.prediction_type](prediction, latents, sigma)
        if i > 0:
            before = levels[i - 1][0]
            older_level = levels[i - 2][0] if order == 2 else None
            here = move(corrected_estimate(clean, past, older, (older_level, before, sigma)), corrected, before, sigma)
        else:
            here = latents
        # At a level of 0 the step is infinitely long in lambda, and only the first order is defined.
        order = 2 if i > 0 and to > 0 and not (i == len(levels) - 1 and options.lower_order_final) else 1
        ahead = second_order(clean, past, (levels[i - 1][0], sigma, to)) if order == 2 else clean
        updates.append([move(ahead, here, sigma, to), here, clean, past])
    return trajectory(timesteps, updates, levels)


def corrected_estimate(clean, past, older, levels: tuple[float | None, float, float]):
    """UniC's estimate of the clean latents for the step from `past` to `clean` (UniPC, algorithm 1).

    It is of second order if the level of `older` is given, else of first.
    """
    older_level, before, sigma = levels
    if older_level is None:
        return past + (clean - past) / 2
    # R_p rho = phi / B(h) of the paper, for p = 2, in h = lambda_t - lambda_s as predicted clean latents have it.
    h = np.log(before / sigma)
    r = np.log(before / older_level) / h
    phi_1 = np.expm1(-h)
    phi_2 = phi_1 / -h - 1
    phi_3 = phi_2 / -h - 1 / 2
    of_older, of_clean = np.linalg.solve([[1, 1], [r, 1]], [phi_2 / phi_1, 2 * phi_3 / phi_1])
    return past + of_older * (older - past) / r + of_clean * (clean - past)


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


def dpmpp_sde(schedule: NoiseSchedule, options: Options, steps: int, skipped: int = 0) -> Trajectory:
    """DPM-Solver++ (stochastic) of k-diffusion: an ancestral step to the middle, whose estimate the whole one takes.

    The noise is one Brownian motion: that of the whole step goes on from that of its first half.
    """
    trained = trained_sigmas(schedule)
    timesteps, sigmas = in_karras_scale(schedule, options, steps, skipped)
    latents, source, first_noise, prediction, noise = np.eye(5)
    clean = CLEAN[schedule.prediction_type]
    called, updates, levels = [], [], []
    for i, (sigma, to) in enumerate(pairwise(np.append(sigmas, 0.0))):
        called.append(timesteps[i])
        # The end, where there is no middle, is Euler's step: the estimate itself.
        middle = np.sqrt(sigma * to)
        start = latents / signal(sigma)
        half = ancestral_step(clean(prediction, latents, sigma), start, noise, (sigma, middle))
        levels.append((sigma, middle))
        updates.append([signal(middle) * half, start, noise])
        if to > 0:
            called.append(to_timesteps(middle, trained))
            levels.append((middle, to))
            whole = np.sqrt(sigma - middle) * first_noise + np.sqrt(middle - to) * noise
            estimate = clean(prediction, latents, middle)
            ahead = ancestral_step(estimate, source, whole / np.sqrt(sigma - to), (sigma, to))
            updates.append([signal(to) * ahead, source, first_noise])
    return trajectory(called, updates, levels, first_scale(options, sigmas))


def ancestral_step(clean, start, noise, levels: tuple[float, float]):
    """A step in the scale of Karras et al. to a lower level than `to`, and fresh noise up to it."""
    # down and up are sigma_down and sigma_up of k-diffusion's get_ancestral_step at eta = 1:
    # up^2 = to^2 (sigma^2 - to^2) / sigma^2.
    sigma, to = levels
    down = to**2 / sigma
    return clean + down / sigma * (start - clean) + np.sqrt(to**2 - down**2) * noise


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
