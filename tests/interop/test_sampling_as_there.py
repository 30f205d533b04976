"""Images sampled here and by diffusers' pipeline from the same noise are the same, in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from pipelines import DDPMPipeline, network, pipeline, saved
from torch import Tensor

from ddpmctl.cli import main
from ddpmctl.core.noise import ImageNoise
from ddpmctl.core.samplers import ddpm
from ddpmctl.plans import plan
from ddpmctl.sampling import Model, generate, load_model

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning", "ignore:.algorithm_types dpmsolver:FutureWarning")

N, SEED, SHAPE = 2, 5, (3, 16, 16)
TOLERANCE = 1e-3


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers draws what ddpmctl draws: x_T, then the noise of every step."""
    noise = ImageNoise(SEED, range(N), SHAPE)
    draw = lambda shape, **options: noise()
    monkeypatch.setattr("diffusers.pipelines.ddpm.pipeline_ddpm.randn_tensor", draw)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", draw)


def theirs(pipe: DDPMPipeline, steps: int) -> Tensor:
    """What the pipeline makes, in 0..1."""
    pipe.set_progress_bar_config(disable=True)
    images: Tensor = pipe(batch_size=N, num_inference_steps=steps, output_type="pt").images
    return images if isinstance(images, Tensor) else torch.as_tensor(np.asarray(images)).permute(0, 3, 1, 2)


def ours(model: Model, variance: str | None) -> Tensor:
    way = plan(None, "ddpm", None, None)
    states = generate(model.denoiser, SHAPE, N, seed=SEED, way=way, device=model.device, options={"variance": variance})
    *_, (_, last) = states
    assert last.t == 0
    return (last.x_t / 2 + 0.5).clamp(0, 1)


CASES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "as google's": ("google", {"num_train_timesteps": 200, "beta_start": 5e-4, "beta_end": 0.1, "variance_type": "fixed_large"}, "beta", "clip"),
    "as the example trains": (
        "example", {"num_train_timesteps": 100, "beta_start": 1e-3, "beta_end": 0.2}, "posterior", "clip",
    ),
    "cosine, v": (
        "google", {"num_train_timesteps": 60, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}, "posterior", "clip",
    ),
    "cosine, x0, no clipping": (
        "example",
        {"num_train_timesteps": 60, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample", "clip_sample": False},
        "posterior", "none",
    ),
    "zero SNR, v": (
        "google", {"num_train_timesteps": 100, "beta_start": 1e-3, "beta_end": 0.2, "prediction_type": "v_prediction",
                   "rescale_betas_zero_snr": True, "variance_type": "fixed_large"}, "beta", "clip",
    ),
    "learned variance": ("learned variance", {"num_train_timesteps": 100, "beta_start": 1e-3, "beta_end": 0.2}, "learned", "clip"),
}  # fmt: skip


@pytest.mark.usefixtures("same_noise")
@pytest.mark.parametrize("case", CASES)
def test_a_pipeline_of_diffusers_draws_the_same_images_here(tmp_path: Path, case: str) -> None:
    name, scheduler, variance, threshold = CASES[case]
    saved(tmp_path / "pipe", name, scheduler)
    model = load_model(tmp_path / "pipe", "cpu", threshold=threshold)
    assert f"--variance {variance} --threshold {threshold}" in model.notes[-1]
    there = theirs(DDPMPipeline.from_pretrained(tmp_path / "pipe"), scheduler["num_train_timesteps"])
    here = ours(model, variance)
    assert there.std() > 0.05
    assert (here - there).abs().max() < TOLERANCE


@pytest.mark.usefixtures("same_noise")
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_run_of_ours_draws_the_same_images_there(trained: Path, tmp_path: Path, weights: str) -> None:
    assert main(["convert", str(trained), "pipe/", "--weights", weights]) == 0
    there = theirs(DDPMPipeline.from_pretrained(tmp_path / "pipe"), 20)
    here = ours(load_model(trained, "cpu", weights=weights), "beta")
    assert there.std() > 0.05
    assert (here - there).abs().max() < TOLERANCE


def test_a_pipeline_steps_over_levels_as_we_do(tmp_path: Path) -> None:
    """25 of 1000 steps, at the levels at which diffusers stops."""
    saved(tmp_path / "pipe", "google", {"clip_sample": True})
    pipe = DDPMPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    there = pipe(batch_size=N, generator=generator, num_inference_steps=25, output_type="pt").images
    there = there if isinstance(there, Tensor) else torch.as_tensor(np.asarray(there)).permute(0, 3, 1, 2)
    grid = [int(t) + 1 for t in pipe.scheduler.timesteps] + [0]
    generator = torch.Generator().manual_seed(3)
    draw = lambda: torch.randn(N, *SHAPE, generator=generator)
    denoiser = load_model(tmp_path / "pipe", "cpu").denoiser
    *_, last = ddpm(denoiser, draw(), grid, noise=draw, variance="posterior")
    assert ((last.x_t / 2 + 0.5).clamp(0, 1) - there).abs().max() < TOLERANCE


EXACT: dict[str, tuple[str, dict[str, Any], str]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}, "--sampler ddim --threshold none"),
    "dpm++": ("DPMSolverMultistepScheduler", {}, "--sampler dpm++ --threshold none"),
    "dpm++ of first order": ("DPMSolverMultistepScheduler", {"solver_order": 1}, "--sampler ddim --threshold none"),
    "dpm++, cut": ("DPMSolverMultistepScheduler", {"thresholding": True}, "--sampler dpm++ --threshold clip"),
    "sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "--sampler dpm++sde --threshold none"),
    "sde of first order": (
        "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}, "--sampler ddim --eta 1 --threshold none",
    ),
    "unipc": ("UniPCMultistepScheduler", {}, "--sampler unipc --threshold none"),
    "unipc, cut": ("UniPCMultistepScheduler", {"thresholding": True, "solver_type": "midpoint"}, "--sampler unipc --threshold clip"),
}  # fmt: skip


def swapped(path: Path, kind: str, **options: Any) -> Any:
    """A folder of a pipeline with the scheduler ``kind``, linear in 100 steps; returns that scheduler."""
    pipe = pipeline(network("example"))
    scheduler = getattr(diffusers, kind)(num_train_timesteps=100, beta_start=1e-3, beta_end=0.2, **options)
    pipe.register_modules(scheduler=scheduler)
    pipe.save_pretrained(path)
    return scheduler


@pytest.mark.parametrize("case", EXACT)
def test_flags_that_are_told_as_equal_draw_the_same_images(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, options, flags = EXACT[case]
    scheduler = swapped(tmp_path / "pipe", kind, timestep_spacing="trailing", **options)
    assert load_model(tmp_path / "pipe", "cpu").notes == (f"as its own pipeline samples: {flags}",)
    noise = ImageNoise(SEED, range(N), SHAPE)
    monkeypatch.setattr("diffusers.schedulers.scheduling_dpmsolver_multistep.randn_tensor", lambda shape, **options: noise().double())
    net, x = network("example"), noise()
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t).sample, t, x).prev_sample
    there = ((x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255).round().int().numpy()
    assert main(["sample", "pipe", *flags.split(), "--steps", "10", "-n", str(N), "--seed", str(SEED), "-o", "here.npz"]) == 0
    with np.load("here.npz") as file:
        here = file[file.files[0]].astype(int)
    assert there.std() > 12
    assert np.abs(here - there).max() <= 1


def test_thresholding_that_is_clipping_is_told_so(tmp_path: Path, same_noise: None) -> None:
    """Theirs cuts at a percentile of no more than sample_max_value, which is 1 unless said."""
    scheduler = {"num_train_timesteps": 50, "beta_start": 2e-3, "beta_end": 0.4, "thresholding": True, "clip_sample": False}
    saved(tmp_path / "pipe", "example", scheduler)
    model = load_model(tmp_path / "pipe", "cpu", threshold="clip")
    assert model.notes == ("as its own pipeline samples: --sampler ddpm --variance posterior --threshold clip",)
    assert (ours(model, "posterior") - theirs(DDPMPipeline.from_pretrained(tmp_path / "pipe"), 50)).abs().max() < TOLERANCE


TRAILING = {"timestep_spacing": "trailing"}
NEAREST: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "a wider clip": ("DDPMScheduler", {"clip_sample_range": 2.0}, "--sampler ddpm --variance posterior --threshold clip", "clip_sample_range 2.0"),
    "a clip that is no truth value": ("DDPMScheduler", {"clip_sample": "no"}, "--sampler ddpm --variance posterior --threshold clip", "clip_sample no"),
    "a higher threshold": (
        "DDPMScheduler", {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
        "--sampler ddpm --variance posterior --threshold dynamic", "sample_max_value 1.5, dynamic_thresholding_ratio 0.9",
    ),
    "a variance that is no number there": (
        "DDPMScheduler", {"variance_type": "fixed_large_log"}, "--sampler ddpm --variance beta --threshold clip", "variance_type fixed_large_log",
    ),
    "ddim, clipped": ("DDIMScheduler", TRAILING, "--sampler ddim --threshold clip", "an eps that is left as it was before x0 is cut"),
    "ddim, other levels": ("DDIMScheduler", {"clip_sample": False}, "--sampler ddim --threshold none", "timestep_spacing leading"),
    "ddim, another end": (
        "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, **TRAILING}, "--sampler ddim --threshold none", "set_alpha_to_one False",
    ),
    "dpm++, other levels": ("DPMSolverMultistepScheduler", {}, "--sampler dpm++ --threshold none", "timestep_spacing linspace"),
    "third order": ("DPMSolverMultistepScheduler", {"solver_order": 3, **TRAILING}, "--sampler dpm++ --threshold none", "solver_order 3"),
    "dpm": (
        "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", **TRAILING},
        "--sampler dpm++ --threshold none", "final_sigmas_type sigma_min, algorithm_type dpmsolver",
    ),
    "sde, Karras": (
        "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True, **TRAILING},
        "--sampler dpm++sde --spacing karras --threshold none", "use_karras_sigmas True",
    ),
    "exponential": (
        "UniPCMultistepScheduler", {"use_exponential_sigmas": True, **TRAILING},
        "--sampler unipc --spacing logsnr --threshold none", "use_exponential_sigmas True",
    ),
    "beta sigmas": ("DPMSolverMultistepScheduler", {"use_beta_sigmas": True, **TRAILING}, "--sampler dpm++ --threshold none", "use_beta_sigmas True"),
    "unipc of third order": ("UniPCMultistepScheduler", {"solver_order": 3, **TRAILING}, "--sampler unipc --threshold none", "solver_order 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", NEAREST)
def test_what_has_no_counterpart_is_told_and_the_flags_are_the_nearest(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, options, flags, lacks = NEAREST[case]
    swapped(tmp_path / "pipe", kind, **options)
    told = f"nearest to how its own pipeline samples: {flags}; without counterpart here: {lacks}"
    assert load_model(tmp_path / "pipe", "cpu").notes == (told,)
    assert main(["convert", "pipe", "x.pt", "-q"]) == 0
    assert main(["inspect", "x.pt", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["converted"]
    assert facts["sampled there, nearest"] == flags and facts["without counterpart"] == lacks and "sampled there" not in facts
    assert main(["sample", "pipe", *flags.split(), "--steps", "3", "-n", "1", "-o", "x.png"]) == 0


def test_a_scheduler_of_which_none_of_ours_is_near_is_named(tmp_path: Path) -> None:
    swapped(tmp_path / "pipe", "PNDMScheduler")
    model = load_model(tmp_path / "pipe", "cpu")
    assert model.notes == ("its own pipeline samples with what is without counterpart here: PNDMScheduler",)
    assert model.config.diffusion.schedule == "linear"


def test_the_command_draws_what_the_pipeline_draws(tmp_path: Path, same_noise: None) -> None:
    scheduler = {"num_train_timesteps": 50, "beta_schedule": "squaredcos_cap_v2", "variance_type": "fixed_large"}
    saved(tmp_path / "pipe", "example", scheduler)
    there = theirs(DDPMPipeline.from_pretrained(tmp_path / "pipe"), 50)
    command = ["sample", "pipe", "-n", str(N), "--seed", str(SEED), "--sampler", "ddpm", "--variance", "beta", "-o", "here.npz"]
    assert main(command) == 0
    with np.load("here.npz") as file:
        here = file[file.files[0]].astype(int)
    assert np.abs(here - (there.permute(0, 2, 3, 1).numpy() * 255).round().astype(int)).max() <= 1
