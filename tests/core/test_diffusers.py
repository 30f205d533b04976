"""Samplers against Hugging Face diffusers' schedulers: the same network, step by step, in float64.

Their tables are float32, whatever the samples are. So each comparison is made twice: with their tables as they are,
to 1e-4, and with ours put into their public attributes (``alphas_cumprod``, ``sigmas``), after which what is left is
rounding. The first is left out for cosine, where float32 does not hold abar_T = 2e-9, and x0 out of eps is off by 4e-3.
They index the network with t - 1, and the levels are handed over with ``timesteps=`` where they take them; where not,
``timestep_spacing="trailing"`` is our ``linear``. Their own Karras and log-SNR spacings lie between levels, so ours are
handed over for those. ``final_sigmas_type="zero"`` is our level 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.prediction import PREDICTIONS
from ddpmctl.core.samplers import SAMPLERS
from ddpmctl.core.schedule import NoiseSchedule
from ddpmctl.core.spacing import spaced_timesteps

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")

SHAPE = (2, 3, 4, 4)
LINEAR, COSINE = (NoiseSchedule.named(name, 1000) for name in ("linear", "cosine"))
TOLERANCE = {"theirs": 1e-4, "ours": 1e-8}
CASES = [("linear", LINEAR, "theirs"), ("linear", LINEAR, "ours"), ("cosine", COSINE, "ours")]
SCHEDULES = [pytest.param(schedule, tables, id=f"{name}-{tables}") for name, schedule, tables in CASES]
GRIDS = [
    pytest.param(schedule, tables, spaced_timesteps(schedule, steps, spacing), id=f"{name}-{tables}-{spacing}-{steps}")
    for name, schedule, tables in CASES
    for spacing, steps in (("linear", 10), ("quadratic", 20), ("karras", 12), ("logsnr", 25), ("linear", 1000))
]


def network(schedule: NoiseSchedule, prediction: str) -> Callable[..., Tensor]:
    """A smooth guess of x0 within [-1, 1], told as the ``prediction`` has it."""

    def net(x: Tensor, t_index: Tensor, label: Tensor | None = None) -> Tensor:
        t = t_index.long().reshape(-1, *[1] * (x.ndim - 1)) + 1
        signal, noise = schedule.alpha_bar[t].sqrt(), (1 - schedule.alpha_bar[t]).sqrt()
        x0 = torch.sin(1.3 * x + 0.002 * t)
        return PREDICTIONS[prediction].target(x0, (x - signal * x0) / noise, signal, noise)

    return net


def draws(count: int = 1001) -> Iterator[Tensor]:
    """x_T and the noise of every step, exact in float32, as theirs is."""
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(SHAPE, generator=generator).double() for _ in range(count))


def ours(sampler: str, schedule: NoiseSchedule, grid: Sequence[int], prediction: str, **options: object) -> list[Tensor]:
    stream = draws()
    denoiser = Denoiser(network(schedule, prediction), schedule, prediction, threshold="none")
    states = SAMPLERS[sampler](denoiser, next(stream), grid, noise=lambda: next(stream), **options)
    return [state.x_t for state in states]


def scheduler(name: str, schedule: NoiseSchedule, prediction: str = "eps", **options: object) -> Any:
    kind = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[prediction]
    return getattr(diffusers, name)(
        trained_betas=schedule.betas[1:].tolist(), num_train_timesteps=schedule.timesteps, prediction_type=kind, **options
    )


def sigmas(schedule: NoiseSchedule, grid: Sequence[int]) -> Tensor:
    return torch.exp(-schedule.half_log_snr())[list(grid)]


def walk(theirs: Any, net: Callable[..., Tensor], x: Tensor, **options: Callable[[], Tensor]) -> list[Tensor]:
    states = []
    for t in theirs.timesteps:
        x = theirs.step(net(x, t), t, x, **{name: draw() for name, draw in options.items()}).prev_sample
        states.append(x)
    return states


def difference(left: list[Tensor], right: list[Tensor]) -> float:
    """The largest over the whole trajectory."""
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize(("variance", "theirs_is"), [("posterior", "fixed_small"), ("beta", "fixed_large")])
@pytest.mark.parametrize(("schedule", "tables"), SCHEDULES)
def test_ddpm(schedule, variance, theirs_is, prediction, tables):
    """Levels that end in 1, 0: from a higher one theirs adds noise at the last step too."""
    grid = [*spaced_timesteps(schedule, 40)[:-1], 1, 0]
    theirs = scheduler("DDPMScheduler", schedule, prediction, variance_type=theirs_is, clip_sample=False)
    theirs.set_timesteps(timesteps=[t - 1 for t in grid[:-1]])
    if tables == "ours":
        theirs.alphas_cumprod, theirs.one = schedule.alpha_bar[1:], torch.ones((), dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)  # theirs draws in the dtype of the samples
    x_T = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    state, x = generator.get_state(), x_T
    net, right = network(schedule, prediction), []
    for t in theirs.timesteps:
        x = theirs.step(net(x, t), int(t), x, generator=generator).prev_sample
        right.append(x)
    generator.set_state(state)
    left = SAMPLERS["ddpm"](
        Denoiser(net, schedule, prediction, threshold="none"), x_T, grid, variance=variance,
        noise=lambda: torch.randn(SHAPE, generator=generator, dtype=torch.float64),
    )  # fmt: skip
    assert difference([state.x_t for state in left], right) < TOLERANCE[tables]


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("steps", [3, 40, 1000])
@pytest.mark.parametrize(("schedule", "tables"), SCHEDULES)
def test_ddpm_with_learned_variance(schedule, steps, prediction, tables):
    """The second half of the output, -1 to 1, lies between the variances of the step, whatever its length.

    In their tables 1 - abar_1 is right to 6e-4 of itself, on which the variance of a long step to level 1 hangs.
    """
    grid = [*(t for t in spaced_timesteps(schedule, steps)[:-1] if t > 1), 1, 0]
    theirs = scheduler("DDPMScheduler", schedule, prediction, variance_type="learned_range", clip_sample=False)
    theirs.set_timesteps(timesteps=[t - 1 for t in grid[:-1]])
    if tables == "ours":
        theirs.alphas_cumprod, theirs.one = schedule.alpha_bar[1:], torch.ones((), dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    x_T = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    state, x, right = generator.get_state(), x_T, []
    mean = network(schedule, prediction)
    net = lambda x, t_index, label=None: torch.cat([mean(x, t_index), torch.cos(2 * x)], dim=1)
    for t in theirs.timesteps:
        x = theirs.step(net(x, t), int(t), x, generator=generator).prev_sample
        right.append(x)
    generator.set_state(state)
    left = SAMPLERS["ddpm"](
        Denoiser(net, schedule, prediction, threshold="none", learned_variance=True), x_T, grid,
        noise=lambda: torch.randn(SHAPE, generator=generator, dtype=torch.float64),
    )  # fmt: skip
    assert difference([state.x_t for state in left], right) < (TOLERANCE[tables] if tables == "ours" else 5e-4)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [10, 50, 1000])
@pytest.mark.parametrize(("schedule", "tables"), SCHEDULES)
def test_ddim(schedule, steps, eta, tables):
    """Theirs steps by T // steps whatever the levels are, so ``trailing`` alone is right, where steps divides T."""
    theirs = scheduler("DDIMScheduler", schedule, clip_sample=False, timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    if tables == "ours":
        theirs.alphas_cumprod, theirs.final_alpha_cumprod = schedule.alpha_bar[1:], schedule.alpha_bar[0]
    stream = draws()
    net, x, right = network(schedule, "eps"), next(stream), []
    for t in theirs.timesteps:
        more = {"eta": eta, "variance_noise": next(stream)} if eta and len(right) < steps - 1 else {"eta": 0.0}
        x = theirs.step(net(x, t), int(t), x, **more).prev_sample
        right.append(x)
    left = ours("ddim", schedule, spaced_timesteps(schedule, steps), "eps", eta=eta)
    assert difference(left, right) < TOLERANCE[tables]


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("timesteps", [2, 50, 1000])
def test_zero_terminal_snr(name, timesteps):
    """Their rescaling, given our betas in float64."""
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    betas = NoiseSchedule.named(name, timesteps).betas[1:]
    found = NoiseSchedule.named(name, timesteps, zero_snr=True)
    torch.testing.assert_close(found.betas[1:], rescale_zero_terminal_snr(betas.clone()), rtol=0, atol=1e-12)
    assert found.betas[-1] == 1


@pytest.mark.parametrize("steps", [1, 10, 50, 1000])
@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize(
    ("name", "tables", "eta"),
    [("linear", "theirs", 0.0), ("linear", "ours", 0.0), ("linear", "ours", 1.0), ("cosine", "ours", 0.0), ("cosine", "ours", 1.0)],
)
def test_ddim_with_zero_terminal_snr(name, tables, prediction, steps, eta):
    """From the level at which alpha_bar is 0, in theirs as in ours. Theirs, rescaled in float32, is off by 4e-7, whose root eta takes: on some processors that is no number."""
    schedule = NoiseSchedule.named(name, 1000, zero_snr=True)
    theirs = scheduler(
        "DDIMScheduler", NoiseSchedule.named(name, 1000), prediction,
        clip_sample=False, timestep_spacing="trailing", rescale_betas_zero_snr=True,
    )  # fmt: skip
    assert theirs.alphas_cumprod[-1] == 0
    theirs.set_timesteps(steps)
    if tables == "ours":
        theirs.alphas_cumprod, theirs.final_alpha_cumprod = schedule.alpha_bar[1:], schedule.alpha_bar[0]
    stream = draws()
    net, x, right = network(schedule, prediction), next(stream), []
    for t in theirs.timesteps:
        more = {"eta": eta, "variance_noise": next(stream)} if eta and len(right) < steps - 1 else {"eta": 0.0}
        x = theirs.step(net(x, t), int(t), x, **more).prev_sample
        right.append(x)
    left = ours("ddim", schedule, spaced_timesteps(schedule, steps), prediction, eta=eta)
    assert difference(left, right) < (TOLERANCE[tables] if tables == "ours" else 1e-3)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("sampler", ["dpm++", "dpm++sde"])
@pytest.mark.parametrize(("schedule", "tables", "grid"), GRIDS)
def test_dpm_solver(schedule, grid, sampler, prediction, tables):
    """Theirs casts the sample to float32 at every step, so no better than that."""
    algorithm = {"dpm++": "dpmsolver++", "dpm++sde": "sde-dpmsolver++"}[sampler]
    theirs = scheduler("DPMSolverMultistepScheduler", schedule, prediction, algorithm_type=algorithm)
    theirs.set_timesteps(timesteps=[t - 1 for t in grid[:-1]])
    if tables == "ours":
        theirs.sigmas = sigmas(schedule, grid)
    stream = draws()
    right = walk(theirs, network(schedule, prediction), next(stream), **({"variance_noise": lambda: next(stream)} if sampler == "dpm++sde" else {}))
    # A thousand draws add up what their float32 tables are off by, more or less from processor to processor.
    tolerance = {"theirs": 1e-3 if sampler == "dpm++sde" else 1e-4, "ours": 1e-5}[tables]
    assert difference(ours(sampler, schedule, grid, prediction), right) < tolerance


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50, 1000])
@pytest.mark.parametrize(("schedule", "tables"), SCHEDULES)
def test_unipc(schedule, steps, prediction, tables):
    """Theirs takes no levels, but ``trailing``."""
    grid = spaced_timesteps(schedule, steps)
    theirs = scheduler("UniPCMultistepScheduler", schedule, prediction, solver_type="bh2", timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    assert theirs.timesteps.tolist() == [t - 1 for t in grid[:-1]]
    if tables == "ours":
        theirs.sigmas = sigmas(schedule, grid)
    right = walk(theirs, network(schedule, prediction), next(draws()))
    assert difference(ours("unipc", schedule, grid, prediction), right) < TOLERANCE[tables]


@pytest.mark.parametrize(("schedule", "tables", "grid"), GRIDS)
def test_heun(schedule, grid, tables):
    """Theirs walks x / sqrt(abar), and counts the two halves of a step as two."""
    theirs = scheduler("HeunDiscreteScheduler", schedule)
    theirs.set_timesteps(timesteps=[t - 1 for t in grid[:-1]])
    known = sigmas(schedule, grid)
    if tables == "ours":
        theirs.sigmas = torch.cat([known[:1], known[1:-1].repeat_interleave(2), known[-1:]])
    net, right = network(schedule, "eps"), list[Tensor]()
    x = next(draws()) / schedule.alpha_bar[grid[0]].sqrt()
    for i, t in enumerate(theirs.timesteps):
        x = theirs.step(net(theirs.scale_model_input(x, t), t), t, x).prev_sample
        if i % 2 or i == len(theirs.timesteps) - 1:
            right.append(x * schedule.alpha_bar[grid[len(right) + 1]].sqrt())
    assert difference(ours("heun", schedule, grid, "eps"), right) < TOLERANCE[tables]


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 50, 999, 1000])
def test_linear_spacing_is_trailing(steps):
    theirs = scheduler("DDIMScheduler", LINEAR, timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    assert spaced_timesteps(LINEAR, steps, "trailing")[:-1] == [t + 1 for t in theirs.timesteps.tolist()]


@pytest.mark.parametrize("t", [1, 500, 1000])
def test_dynamic_threshold(t):
    theirs = scheduler("DDIMScheduler", LINEAR, thresholding=True, sample_max_value=1e9)
    theirs.alphas_cumprod = LINEAR.alpha_bar[1:]
    theirs.set_timesteps(1000)
    net = lambda x, t_index, label=None: torch.sin(x)
    x = 3 * next(draws())
    x0, _ = Denoiser(net, LINEAR, threshold="dynamic")(x, t)
    there = theirs.step(net(x, torch.tensor(t - 1)), t - 1, x).pred_original_sample
    torch.testing.assert_close(x0, there, rtol=0, atol=1e-12)
