"""Folders of diffusers, old and new, right and wrong; and what is refused by the key that says it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import DDPMScheduler, UNet2DModel, saved
from safetensors.torch import load_file, save_file

from ddpmctl.build import build_schedule
from ddpmctl.cli import main
from ddpmctl.config import RunConfig
from ddpmctl.core.schedule import SCHEDULES, NoiseSchedule
from ddpmctl.errors import CheckpointError, ConfigError, DdpmctlError, Exit
from ddpmctl.interop import diffusers, formats, scheduler
from ddpmctl.interop.imported import Settings
from ddpmctl.interop.schedules import named
from ddpmctl.runfile import Layer, flag_layer, resolve

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "pipe"
    saved(path, "google")
    return path


@pytest.fixture
def pipe(original: Path, tmp_path: Path) -> Path:
    """A folder that a test may change."""
    shutil.copytree(original, tmp_path / "pipe")
    return tmp_path / "pipe"


def change(file: Path, **keys: Any) -> None:
    """Set keys of a JSON file; ... removes one."""
    found = {**json.loads(file.read_text()), **keys}
    file.write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    weights, others = one["net"], other["net"]
    return weights.keys() == others.keys() and all(torch.equal(value, others[key]) for key, value in weights.items())


def test_names_of_2022(pipe: Path, original: Path) -> None:
    """As google's uploads have them: a flat folder, a .bin, other names in attentions, and a config without newer keys."""
    state = load_file(pipe / "unet" / WEIGHTS)
    older = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    renamed = {}
    for name, value in state.items():
        for new, old in older.items():
            name = name.replace(new, old)
        renamed[name] = value
    assert sum(".query." in name for name in renamed) > 2
    flat = pipe.parent / "flat"
    flat.mkdir()
    torch.save(renamed, flat / "diffusion_pytorch_model.bin")
    keep = {"act_fn", "attention_head_dim", "block_out_channels", "center_input_sample", "down_block_types", "downsample_padding",
            "flip_sin_to_cos", "freq_shift", "in_channels", "layers_per_block", "mid_block_scale_factor", "norm_eps", "norm_num_groups",
            "out_channels", "sample_size", "time_embedding_type", "up_block_types", "_class_name"}  # fmt: skip
    unet = json.loads((pipe / "unet" / "config.json").read_text())
    (flat / "config.json").write_text(json.dumps({key: unet[key] for key in keep}))
    (flat / "scheduler_config.json").write_text(json.dumps({
        "_class_name": "DDPMScheduler", "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": True,
        "num_train_timesteps": 1000, "trained_betas": None, "variance_type": "fixed_large", "predict_epsilon": True,
    }))  # fmt: skip
    shutil.copy(pipe / "model_index.json", flat)
    assert same(formats.load(flat).content, formats.load(original).content)


def test_half_precision_is_widened(pipe: Path, original: Path) -> None:
    state = {name: value.half() for name, value in load_file(pipe / "unet" / WEIGHTS).items()}
    (pipe / "unet" / WEIGHTS).unlink()
    save_file(state, pipe / "unet" / "diffusion_pytorch_model.fp16.safetensors", {"format": "pt"})
    found, there = formats.load(pipe).content["net"], formats.load(original).content["net"]
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert max((found[name] - there[name]).abs().max() for name in found) < 2e-3


def test_there_and_back_is_the_same_to_the_bit(original: Path, tmp_path: Path) -> None:
    loaded = formats.load(original)
    diffusers.write(tmp_path / "again", loaded.content)
    before, after = load_file(original / "unet" / WEIGHTS), load_file(tmp_path / "again" / "unet" / WEIGHTS)
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    one, other = (UNet2DModel.from_pretrained(path, subfolder="unet").config for path in (original, tmp_path / "again"))
    assert {k: v for k, v in one.items() if not k.startswith("_")} == {k: v for k, v in other.items() if not k.startswith("_")}
    one, other = (DDPMScheduler.from_pretrained(path, subfolder="scheduler") for path in (original, tmp_path / "again"))
    torch.testing.assert_close(one.alphas_cumprod, other.alphas_cumprod, rtol=0, atol=0)
    assert same(formats.load(tmp_path / "again").content, loaded.content)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another network": ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "_class_name: UNet2DConditionModel"),
    "classes": ("unet/config.json", {"num_class_embeds": 10}, "num_class_embeds: 10"),
    "Fourier time": ("unet/config.json", {"time_embedding_type": "fourier"}, "time_embedding_type: fourier"),
    "mish": ("unet/config.json", {"act_fn": "mish"}, "act_fn: mish"),
    "scale and shift": ("unet/config.json", {"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
    "residual downsampling": ("unet/config.json", {"downsample_type": "resnet"}, "downsample_type: resnet"),
    "no middle": ("unet/config.json", {"mid_block_type": None}, "mid_block_type: None"),
    "centred input": ("unet/config.json", {"center_input_sample": True}, "center_input_sample: True"),
    "scaled middle": ("unet/config.json", {"mid_block_scale_factor": 1.4}, "mid_block_scale_factor: 1.4"),
    "skip blocks": ("unet/config.json", {"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "down_block_types"),
    "attention on one side": ("unet/config.json", {"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "up_block_types"),
    "too few blocks": ("unet/config.json", {"up_block_types": ["UpBlock2D"]}, "up_block_types"),
    "odd widths": ("unet/config.json", {"block_out_channels": [32, 48]}, "block_out_channels: [32, 48]"),
    "widths that are no list": ("unet/config.json", {"block_out_channels": "32"}, "block_out_channels: 32"),
    "no widths": ("unet/config.json", {"block_out_channels": []}, "block_out_channels: []"),
    "two channels": ("unet/config.json", {"in_channels": 2, "out_channels": 2}, "in_channels: 2"),
    "other outputs": ("unet/config.json", {"out_channels": 4}, "out_channels: 4"),
    "groups that do not divide": ("unet/config.json", {"norm_num_groups": 5}, "norm_num_groups: 5"),
    "groups that are no number": ("unet/config.json", {"norm_num_groups": "8"}, "norm_num_groups: 8"),
    "other groups in the middle": ("unet/config.json", {"attn_norm_num_groups": 4}, "attn_norm_num_groups: 4"),
    "heads that do not divide": ("unet/config.json", {"attention_head_dim": 7}, "attention_head_dim: 7"),
    "size that does not halve": ("unet/config.json", {"sample_size": 15}, "sample_size: 15 pixels do not halve evenly 1 times"),
    "size of which one side does not": ("unet/config.json", {"sample_size": [16, 15]}, "sample_size: [16, 15] pixels do not halve"),
    "size that is none": ("unet/config.json", {"sample_size": "big"}, "sample_size: big is not one or two"),
    "size of nothing": ("unet/config.json", {"sample_size": 0}, "sample_size: 0 is not one or two"),
    "size below nothing": ("unet/config.json", {"sample_size": -16}, "sample_size: -16 is not one or two"),
    "size that is true": ("unet/config.json", {"sample_size": True}, "sample_size: True is not one or two"),
    "size of half pixels": ("unet/config.json", {"sample_size": 16.5}, "sample_size: 16.5 is not one or two"),
    "three sides": ("unet/config.json", {"sample_size": [8, 8, 8]}, "sample_size: [8, 8, 8] is not one or two"),
    "weights of another width": ("unet/config.json", {"block_out_channels": [32, 96]}, "down_blocks.1.resnets.0.conv1.weight (64x32x3x3, not 96x32x3x3)"),
    "fewer blocks": ("unet/config.json", {"layers_per_block": 1}, "down_blocks.0.resnets.1.norm1.weight (not known)"),
    "more blocks": ("unet/config.json", {"layers_per_block": 3}, "down_blocks.0.resnets.2.norm1.weight (missing)"),
    "scaled linear": ("scheduler/scheduler_config.json", {"beta_schedule": "scaled_linear"}, "beta_schedule: scaled_linear"),
    "GeoDiff's sigmoid": ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "beta_schedule: sigmoid"),
    "unknown schedule": ("scheduler/scheduler_config.json", {"beta_schedule": "laplace"}, "beta_schedule: laplace"),
    "other ends": ("scheduler/scheduler_config.json", {"beta_end": 0.012}, "beta_end 0.012"),
    "a little other": ("scheduler/scheduler_config.json", {"beta_start": 0.00011}, "beta_start 0.00011"),
    "T of which the ends are others": ("scheduler/scheduler_config.json", {"num_train_timesteps": 500}, "in 500 steps"),
    "T that is none": ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "num_train_timesteps: 0"),
    "betas of another length": ("scheduler/scheduler_config.json", {"trained_betas": [0.1, 0.2]}, "trained_betas"),
    "betas that are none": ("scheduler/scheduler_config.json", {"trained_betas": "all"}, "trained_betas"),
    "zero SNR and eps": ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
    "flow": ("scheduler/scheduler_config.json", {"prediction_type": "flow_prediction"}, "prediction_type: flow_prediction"),
    "another scheduler": ("scheduler/scheduler_config.json", {"_class_name": "ScoreSdeVeScheduler"}, "_class_name: ScoreSdeVe"),
    "learned without a second half": ("scheduler/scheduler_config.json", {"variance_type": "learned_range"}, "variance_type: learned_range"),
    "a text encoder": ("model_index.json", {"text_encoder": ["transformers", "CLIPTextModel"]}, "text_encoder"),
    "another class": ("model_index.json", {"unet": ["diffusers", "UNet1DModel"]}, "UNet1DModel"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_we_do_not_have_is_refused_by_its_key(pipe: Path, case: str) -> None:
    name, keys, words = REFUSED[case]
    change(pipe / name, **keys)
    with pytest.raises(CheckpointError) as caught:
        formats.load(pipe)
    assert words in caught.value.problem, caught.value.problem
    assert str(pipe) in caught.value.problem and caught.value.advice and "\n" not in caught.value.problem


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda pipe: (pipe / "unet" / "config.json").unlink(), "unet/config.json: missing"),
    "no scheduler": (lambda pipe: shutil.rmtree(pipe / "scheduler"), "scheduler_config.json: missing"),
    "no weights": (lambda pipe: (pipe / "unet" / WEIGHTS).unlink(), f"{WEIGHTS}: missing"),
    "not JSON": (lambda pipe: (pipe / "unet" / "config.json").write_text("{"), "config.json: not JSON"),
    "not an object": (lambda pipe: (pipe / "model_index.json").write_text("[1]"), "model_index.json: not a JSON object"),
    "not text": (lambda pipe: (pipe / "unet" / "config.json").write_bytes(b"\xff\xfe"), "config.json: not JSON"),
    "cut": (lambda pipe: (pipe / "unet" / WEIGHTS).write_bytes((pipe / "unet" / WEIGHTS).read_bytes()[:5000]), "damaged or cut"),
    "empty": (lambda pipe: (pipe / "unet" / WEIGHTS).write_bytes(b""), "damaged or cut"),
    "no numbers": (lambda pipe: (pipe / "unet" / WEIGHTS).write_text("weights"), "damaged or cut"),
    "in several files": (
        lambda pipe: (pipe / "unet" / WEIGHTS).rename(pipe / "unet" / "diffusion_pytorch_model.safetensors.index.json"), "missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_named_by_the_file(pipe: Path, case: str) -> None:
    breaks, words = BROKEN[case]
    breaks(pipe)
    with pytest.raises(CheckpointError) as caught:
        formats.load(pipe)
    assert words in caught.value.problem and caught.value.advice


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("touched"),))


def test_code_in_a_bin_is_not_run(pipe: Path) -> None:
    (pipe / "unet" / WEIGHTS).unlink()
    torch.save({"weight": Evil()}, pipe / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="carries code"):
        formats.load(pipe)
    assert not Path("touched").exists()


def test_a_size_that_is_left_open_is_taken_and_told(pipe: Path) -> None:
    change(pipe / "unet" / "config.json", sample_size=None)
    loaded = formats.load(pipe)
    assert loaded.content["image_shape"] == [3, 64, 64] and "data.size 64" in loaded.notes[0]
    given = formats.load(pipe, flag_layer({"data.size": "16x24"}))
    assert given.content["image_shape"] == [3, 16, 24] and not any("data.size" in note for note in given.notes)


@pytest.mark.parametrize("size", [0, -1, "big", 15, [16, 15]])
def test_the_advice_for_an_impossible_size_works(pipe: Path, photos: Path, size: Any, capsys: pytest.CaptureFixture[str]) -> None:
    change(pipe / "unet" / "config.json", sample_size=size)
    assert main(["convert", "pipe", "x.pt"]) == Exit.CHECKPOINT
    shown = capsys.readouterr().err
    assert "to a multiple of 2, or to null and give --size" in shown and "padding" not in shown
    change(pipe / "unet" / "config.json", sample_size=None)
    assert main(["convert", "pipe", "x.pt", "--size", "16"]) == 0
    if size == 0:  # whatever the file said before
        assert main(["train", str(photos), "--init-from", "pipe", "--size", "16", "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("kind", "words"), [(torch.float64, "rounded"), (torch.float16, "widened"), (torch.bfloat16, "widened"), (torch.float32, "")]
)
def test_weights_of_another_precision_are_told(pipe: Path, kind: torch.dtype, words: str) -> None:
    file = pipe / "unet" / WEIGHTS
    state = load_file(file)
    exact = {name: value.double() + 1e-12 for name, value in state.items()}
    save_file({name: value.to(kind) for name, value in exact.items()}, file, {"format": "pt"})
    loaded = formats.load(pipe)
    name = str(kind).removeprefix("torch.")
    told = [note for note in loaded.notes if "float32" in note]
    assert told == ([f"weights of {name} are {words} to float32"] if words else [])
    assert torch.equal(loaded.content["net"]["conv_in.bias"], exact["conv_in.bias"].to(kind).float())


@pytest.mark.parametrize("kind", [torch.int64, torch.complex64, torch.bool])
def test_tensors_of_another_kind_are_named_as_in_the_file(pipe: Path, kind: torch.dtype) -> None:
    file = pipe / "unet" / WEIGHTS
    name, state = "down_blocks.0.resnets.0.conv1.bias", load_file(file)
    torch.save(state | {name: state[name].to(kind)}, file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(CheckpointError) as caught:
        formats.load(pipe)
    assert f"{name} ({str(kind).removeprefix('torch.')}, not float32)" in caught.value.problem


def test_a_number_that_float32_does_not_hold_is_refused(pipe: Path) -> None:
    file = pipe / "unet" / WEIGHTS
    state = {key: value.double() for key, value in load_file(file).items()}
    state["conv_in.bias"][0] = 1e300
    save_file(state, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="too large for float32"):
        formats.load(pipe)


def test_a_key_that_is_not_known_is_told(pipe: Path) -> None:
    """Diffusers leaves it aside with a warning, too."""
    change(pipe / "unet" / "config.json", novelty=3, _private=4)
    notes = formats.load(pipe).notes
    assert notes[0] == f"left aside, as not known: {pipe / 'unet' / 'config.json'}: novelty" and len(notes) == 2


def test_what_the_folder_says_cannot_be_given(pipe: Path) -> None:
    for layer, flag in ((flag_layer({"data.size": "32"}), "--size"), (flag_layer({}, ["model.norm_groups=16"]), "--set model.norm_groups")):
        with pytest.raises(ConfigError, match=flag):
            formats.load(pipe, layer)
    same_again = flag_layer({"data.size": 16}, ["model.norm_groups=8", "model.channel_mults=[1, 2]"])
    assert formats.load(pipe, same_again).content["step"] == 0


@pytest.mark.parametrize("shift", [1, 4, 0.7654321])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("timesteps", [10, 50, 1000, 4000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_of_ours_comes_back(name: str, timesteps: int, zero_snr: bool, shift: float) -> None:
    diffusion = {"schedule": name, "timesteps": timesteps, "shift": shift, "zero_terminal_snr": zero_snr, "prediction": "v"}
    config = RunConfig.model_validate({"diffusion": diffusion})
    written = scheduler.config_of(config)
    theirs = DDPMScheduler(**{key: value for key, value in written.items() if not key.startswith("_")})
    torch.testing.assert_close(theirs.alphas_cumprod.double(), build_schedule(config).alpha_bar[1:], rtol=0, atol=6e-6)
    settings = Settings()
    scheduler.settings_of(Path("x"), written, settings, two_halves=False)
    back = resolve(Layer(settings.says)).diffusion
    assert (back.schedule, back.timesteps, back.zero_terminal_snr, back.prediction) == (name, timesteps, zero_snr, "v")
    assert back.shift == pytest.approx(shift, rel=1e-6)


@pytest.mark.parametrize("shift", [0.1, 1, 2.5, 100])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("timesteps", [2, 3, 50, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_list_of_betas_in_float32_is_known_by_itself(name: str, timesteps: int, zero_snr: bool, shift: float) -> None:
    schedule = NoiseSchedule.named(name, timesteps, shift=shift, zero_snr=zero_snr)
    found = named(schedule.betas[1:].float().double())
    assert found is not None and (found == (name, shift, zero_snr) or timesteps < 50)  # two levels may be those of any name
    back = NoiseSchedule.named(found.name, timesteps, shift=found.shift, zero_snr=found.zero_snr)
    torch.testing.assert_close(back.alpha_bar, schedule.alpha_bar, rtol=0, atol=2e-6)


UNFIT = {
    "classes": ({"data": {"conditional": True}}, ["cats"], "data.conditional"),
    "batch norm": ({"model": {"norm": "batch"}}, [], "model.norm: batch"),
    "gelu": ({"model": {"activation": "gelu"}}, [], "model.activation: gelu"),
    "no time": ({"model": {"time_embedding": "none"}}, [], "model.time_embedding: none"),
    "scaled time": ({"model": {"time_scale": 2.0}}, [], "model.time_scale: 2"),
    "padding": ({"model": {"padding": 1}}, [], "model.padding: 1"),
    "normed queries": ({"model": {"qk_norm": True}}, [], "model.qk_norm: True"),
    "patches": ({"model": {"patch": 2}}, [], "model.patch: 2"),
    "a wide first level": ({"model": {"channel_mults": [2, 2]}}, [], "model.channel_mults: [2, 2]"),
    "uneven levels": ({"model": {"channel_mults": [1, 2], "num_res_blocks": [1, 2]}}, [], "model.num_res_blocks: [1, 2]"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_a_network_that_diffusers_does_not_have_is_not_written(tmp_path: Path, case: str) -> None:
    settings, class_names, words = UNFIT[case]
    config = RunConfig.model_validate(settings)
    with pytest.raises(DdpmctlError) as caught:
        diffusers.write(tmp_path / "pipe", {"config": config.to_dict(), "image_shape": [3, 64, 64], "class_names": class_names})
    assert words in caught.value.problem
    assert not (tmp_path / "pipe").exists()
