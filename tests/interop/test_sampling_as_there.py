"""Images sampled here and by diffusers' pipeline from the same noise are the same, in both directions."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    ("kind", "flags"),
    [("DDIMScheduler", "--sampler ddim --threshold clip"), ("DPMSolverMultistepScheduler", "--sampler dpm++ --threshold none"),
     ("UniPCMultistepScheduler", "--sampler unipc --threshold none"), ("PNDMScheduler", None)],
)  # fmt: skip
def test_pipelines_of_other_schedulers_are_read_too(tmp_path: Path, kind: str, flags: str | None) -> None:
    """They differ in how they sample, not in the process."""
    pipe = pipeline(network("google"))
    pipe.register_modules(scheduler=getattr(diffusers, kind)(beta_schedule="squaredcos_cap_v2"))
    pipe.save_pretrained(tmp_path / "pipe")
    model = load_model(tmp_path / "pipe", "cpu")
    assert model.notes == ((f"as its own pipeline samples: {flags}",) if flags else ())
    assert model.config.diffusion.schedule == "cosine"


def test_the_command_draws_what_the_pipeline_draws(tmp_path: Path, same_noise: None) -> None:
    scheduler = {"num_train_timesteps": 50, "beta_schedule": "squaredcos_cap_v2", "variance_type": "fixed_large"}
    saved(tmp_path / "pipe", "example", scheduler)
    there = theirs(DDPMPipeline.from_pretrained(tmp_path / "pipe"), 50)
    command = ["sample", "pipe", "-n", str(N), "--seed", str(SEED), "--sampler", "ddpm", "--variance", "beta", "-o", "here.npz"]
    assert main(command) == 0
    with np.load("here.npz") as file:
        here = file[file.files[0]].astype(int)
    assert np.abs(here - (there.permute(0, 2, 3, 1).numpy() * 255).round().astype(int)).max() <= 1
