"""The run configuration: typed sections that mirror the YAML run file, each key documented where it is defined.

Nothing here imports torch. Reading, merging and writing run files is in :mod:`ddpmctl.runfile`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from ddpmctl.parsing import check_name, parse_count, parse_device, parse_size, size_text, written
from ddpmctl.rows import nearest, row_names


def _parse_channels(value: object) -> object:
    names = {"grey": 1, "gray": 1, "rgb": 3, "rgba": 4}
    number = names.get(value.lower(), value) if isinstance(value, str) else value
    if number in ("1", "3", "4"):
        number = int(str(number))
    if isinstance(number, bool) or number not in ("auto", 1, 3, 4):
        raise ValueError(f"{written(value)} is not auto, 1 (grey), 3 (rgb) or 4 (rgba)")
    return number


def _parse_time_embedding(value: object) -> object:
    if value is None:
        return "none"
    if value in ("auto", "none"):
        return value
    width = parse_count(value)
    if not 2 <= width <= 32_768 or width % 2:
        raise ValueError(f"{written(value)} is not auto, none or an even number up to 32,768")
    return width


def _parse_head_channels(value: object) -> object:
    if value == "all":
        return value
    channels = parse_count(value)
    if not 1 <= channels <= 8192:
        raise ValueError(f"{written(value)} is not all, or a number from 1 to 8,192")
    return channels


def _parse_log(value: object) -> object:
    if isinstance(value, str):
        value = [value]
    return [] if value == ["none"] else value


def _parse_number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is not a number")
    return value


def _check_digest(value: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"{written(value)} is not 64 hexadecimal digits")
    return value


def _row(module: str, table: str) -> Callable[[str], str]:
    """Validator: the value is a key of the literal dict ``table`` of ``ddpmctl.<module>``."""

    def check(value: str) -> str:
        names = row_names(module, table)
        if value not in names:
            raise ValueError(f"{written(value)} is not one of {', '.join(names)}{nearest(value, names)}")
        return value

    return check


Count = Annotated[int, BeforeValidator(parse_count)]
Positive = Annotated[Count, Field(ge=1)]
Width = Annotated[Count, Field(ge=1, le=8192)]
Text = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) in (int, float) else value)]
Place = Annotated[Text, AfterValidator(check_name)]
Digest = Annotated[Text, AfterValidator(_check_digest)]
Size = Annotated[
    Literal["auto"] | tuple[int, int], BeforeValidator(parse_size), PlainSerializer(size_text, return_type=str | int)
]
Device = Annotated[str, BeforeValidator(parse_device)]
Channels = Annotated[Literal["auto", 1, 3, 4], BeforeValidator(_parse_channels)]
TimeEmbedding = Annotated[Literal["auto", "none"] | int, BeforeValidator(_parse_time_embedding)]
HeadChannels = Annotated[Literal["all"] | int, BeforeValidator(_parse_head_channels)]
Schedule = Annotated[str, AfterValidator(_row("core.schedule", "SCHEDULES"))]
Prediction = Annotated[str, AfterValidator(_row("core.prediction", "PREDICTIONS"))]
Loss = Annotated[str, AfterValidator(_row("core.losses", "LOSSES"))]
Weighting = Annotated[str, AfterValidator(_row("core.losses", "WEIGHTINGS"))]
TSampling = Annotated[str, AfterValidator(_row("core.draws", "T_SAMPLINGS"))]
Norm = Annotated[str, AfterValidator(_row("core.unet", "NORMS"))]
Activation = Annotated[str, AfterValidator(_row("core.unet", "ACTIVATIONS"))]
Sampler = Annotated[str, AfterValidator(_row("core.samplers", "SAMPLERS"))]
LrSchedule = Annotated[str, AfterValidator(_row("core.optim", "LR_SCHEDULES"))]
Log = Annotated[list[Annotated[str, AfterValidator(_row("boards", "BOARDS"))]], BeforeValidator(_parse_log)]
Optimizer = Annotated[str, AfterValidator(_row("core.optim", "OPTIMIZERS"))]
EmaWarmup = Annotated[str, AfterValidator(_row("core.ema", "WARMUPS"))]
Fit = Annotated[str, AfterValidator(_row("data.decode", "FITS"))]
Number = Annotated[float, BeforeValidator(_parse_number)]
Rate = Annotated[Number, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[Number, Field(ge=0, le=1, allow_inf_nan=False)]


LEAST_SHIFT, MOST_SHIFT = 0.1, 100.0
"""Of ``diffusion.shift``."""

MOST_HELD_OUT = 1000
"""Images that are not trained on, whatever ``data.holdout`` says."""


class Section(BaseModel):
    """A group of keys; unknown ones are refused and values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class DataConfig(Section):
    """The images and how they become tensors."""

    path: Place | None = Field(None, description="folder or .zip of images, tar shards, torchvision:NAME or hf:NAME; the DATA of the command goes first")
    size: Size = Field((64, 64), description='64, "48x64" (height x width), or auto: the size that all images share')
    channels: Channels = Field("auto", description="auto | 1 (grey) | 3 (rgb) | 4 (rgba, keeps transparency)")
    fit: Fit = Field("crop", description="crop (fill, cut the middle) | pad (whole image on background) | stretch")
    hflip: bool = Field(False, description="mirror each image left to right with probability 1/2")
    conditional: bool = Field(False, description="learn classes; a class is a first-level folder")
    background: str = Field("white", description="colour behind transparent pixels and around padded images")
    on_bad: Literal["skip", "error"] = Field("skip", description="skip unreadable images, or stop with an error")
    max_bad: Share = Field(0.1, description="stop when more than this share of the images is unreadable")
    workers: Annotated[Count, Field(ge=1, le=1024)] | Literal["auto"] = Field(
        "auto", description="threads that decode images; auto: one a core"
    )
    cache: bool = Field(True, description="keep the decoded images for the next run; see `ddpmctl cache`")
    shuffle: Positive = Field(
        10_000, description="of tar shards: how many images that follow each other are mixed, as far as 256 MiB hold them decoded"
    )
    holdout: Annotated[Number, Field(ge=0, lt=1, allow_inf_nan=False)] = Field(
        0.02, description="share of the images (1,000 at most) that val_loss is measured on, not trained on; 0: none"
    )


class DiffusionConfig(Section):
    """What is learned: forward process, network target and loss."""

    timesteps: Annotated[Count, Field(ge=2, le=100_000)] = Field(1000, description="T, the number of noising steps")
    schedule: Schedule = Field("linear", description="linear | cosine | sigmoid")
    shift: Annotated[Number, Field(ge=LEAST_SHIFT, le=MOST_SHIFT)] = Field(
        1.0, description="times the noise beside the image, SNR / shift^2: for large images, such as size / 64"
    )
    zero_terminal_snr: bool = Field(
        False, description="rescale the schedule so that nothing of the image is left at T; for prediction v or x0"
    )
    prediction: Prediction = Field("eps", description="what the network predicts: eps | x0 | v")
    loss: Loss = Field("l2", description="l2 | l1 | huber")
    weighting: Weighting = Field(
        "uniform", description="how much each noise level counts in training: uniform | min_snr | p2"
    )
    t_sampling: TSampling = Field(
        "uniform", description="draws of t, without bias: uniform | stratified (spread over a batch) | importance"
    )
    learn_variance: bool = Field(
        False, description="the network says how much noise a step of ddpm adds, too: better bits/dim, and few steps"
    )
    offset_noise: Annotated[Number, Field(ge=0, le=1)] = Field(
        0.0, description="share of noise that a whole channel has in common, for dark and bright images; 0.1 is usual"
    )


class ModelConfig(Section):
    """The UNet."""

    base_channels: Width = Field(128, description="channels of the first level")
    channel_mults: list[Annotated[Count, Field(ge=1, le=64)]] = Field(
        [1, 2, 2, 2], min_length=1, max_length=8, description="width of each level"
    )
    num_res_blocks: Annotated[Count, Field(ge=1, le=64)] | list[Annotated[Count, Field(le=64)]] = Field(
        2, description="residual blocks a level going down (one more going up); a list: for each level, 0 or more"
    )
    attention_levels: list[Count] = Field(
        [1], description="levels with self-attention, 0 is full size"
    )
    middle_attention: bool = Field(True, description="self-attention in the middle")
    head_channels: HeadChannels = Field("all", description="channels of an attention head; all: a single head")
    qk_norm: bool = Field(False, description="norms queries and keys: attention stays soft at high learning rates")
    dropout: Annotated[Number, Field(ge=0, lt=1)] = Field(0.1, description="inside residual blocks")
    label_dropout: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the labels hidden in training, so that samples can be guided (0.1 is usual); 0: none"
    )
    norm: Norm = Field("group", description="group | batch | instance | none")
    norm_groups: Width = Field(32, description="groups of norm: group; divides every level's channels")
    norm_eps: Annotated[Number, Field(gt=0, le=1)] = Field(
        1e-5, description="added to the variance in a norm; 1e-6 in Ho et al.'s networks"
    )
    activation: Activation = Field("silu", description="silu | relu | gelu | mish")
    time_embedding: TimeEmbedding = Field("auto", description="width; auto: 4 x base_channels; none: no time input")
    time_scale: Annotated[Number, Field(gt=0, allow_inf_nan=False)] = Field(
        1.0, description="multiplies t before embedding"
    )
    time_order: Literal["sin_cos", "cos_sin"] = Field(
        "sin_cos", description="sin_cos | cos_sin (diffusers' example): the halves of the time embedding"
    )
    time_shift: Annotated[Number, Field(ge=0, le=1)] = Field(
        0.0, description="frequency i of h is 10000^(-i / (h - shift)); 1 in Ho et al.'s networks, 0 in others"
    )
    down_padding: Literal["symmetric", "right_bottom"] = Field(
        "symmetric", description="zeros where the size is halved: symmetric | right_bottom (Ho et al.'s networks)"
    )
    padding: Annotated[Count, Field(le=64)] = Field(
        0, description="pixels added on each side of the input, cut off again"
    )
    patch: Annotated[Count, Field(ge=1, le=16)] = Field(
        1, description="the network works on squares of so many pixels a side; 2 is two to three times as fast"
    )


class TrainConfig(Section):
    """The training loop."""

    steps: Positive = Field(100_000, description="optimiser steps; 100k, 1.5M, 1e5")
    batch_size: Annotated[Count, Field(ge=1, le=1_000_000)] = Field(
        128, description="images a step, whatever grad_accum is"
    )
    grad_accum: Positive = Field(1, description="parts a batch is cut into to save memory")
    optimizer: Optimizer = Field("adam", description="adam | adamw")
    lr: Annotated[Number, Field(gt=0, allow_inf_nan=False)] = Field(2e-4, description="learning rate")
    beta1: Annotated[Number, Field(ge=0, lt=1)] = Field(0.9, description="Adam's first decay")
    beta2: Annotated[Number, Field(ge=0, lt=1)] = Field(0.999, description="Adam's second decay")
    weight_decay: Rate = Field(0.0, description="weight decay")
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = Field(
        "none",
        description="torch.compile of the network: none | default | reduce-overhead (CUDA graphs) | max-autotune",
    )
    init_from: Place | None = Field(
        None, description="checkpoint or run folder, of other tools too, whose weights a new run starts with; --init-from"
    )
    init_digest: Digest | None = Field(
        None, description="SHA-256 of those weights, written by the run: others in their place are refused"
    )
    lr_schedule: LrSchedule = Field(
        "constant", description="constant | linear | cosine | cosine_flat | geometric (the last two end at lr x 0.01)"
    )
    lr_warmup: Count = Field(0, description="steps of warm-up, for every schedule but geometric")
    grad_clip: Rate = Field(1.0, description="largest gradient norm; 0: no clipping")
    ema_decay: Annotated[Number, Field(ge=0, lt=1)] = Field(0.9999, description="decay of the averaged weights")
    ema_warmup: EmaWarmup = Field(
        "gradual", description="gradual (usable at any length) | copy (plain copy until ema_start) | none"
    )
    ema_start: Count = Field(2000, description="step at which ema_warmup: copy starts to average")
    ema_every: Positive = Field(1, description="steps between updates of the average")
    ema_snapshot_every: Count = Field(
        0, description="steps between snapshots of two more averages, from which `sample --ema-length` makes others; 0: none"
    )
    save_every: Positive = Field(5000, description="steps between checkpoints")
    keep: Positive = Field(3, description="newest checkpoints kept, and the newest that was due by save_every")
    sample_every: Count = Field(1000, description="steps between sample grids; 0: only at the end")
    samples: Annotated[Positive, Field(le=1024)] = Field(36, description="images of a sample grid")
    sampler: Sampler = Field("ddim", description="sampler of the grids: ddim | ddpm | dpm++ | dpm++sde | unipc | heun")
    sample_steps: Positive = Field(50, description="denoising steps of the grids")
    log_every: Positive = Field(10, description="steps between rows of metrics.csv")
    log: Log = Field(
        [], max_length=8, description="boards that show numbers and grids, too: a list of tensorboard, wandb, mlflow"
    )
    val_every: Count = Field(1000, description="steps between measurements of val_loss; 0: only at the end")
    evaluate_every: Count = Field(
        0, description="steps between measurements of KID, drawn as the grids are; best.pt is the best so far; 0: none"
    )
    evaluate_samples: Annotated[Count, Field(ge=20, le=100_000)] = Field(
        500, description="samples, and images of the data, that KID compares"
    )
    bad_steps: Positive = Field(
        20, description="steps in a row with a loss or gradient that is not finite until the run goes back to a checkpoint"
    )
    max_rollbacks: Count = Field(3, description="how often it may go back, each time to half the lr, before it gives up")


class RunConfig(Section):
    """Everything that defines a run: what ``run.yaml`` holds and every checkpoint carries."""

    device: Device = Field("auto", description="auto | cpu | cuda | cuda:N | mps")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="auto | fp32 | bf16 | fp16 (with loss scaling); auto: bf16 where the hardware is faster in it, else fp32",
    )
    seed: Annotated[Count, Field(lt=2**63)] = Field(0, description="everything random follows from it")
    data: DataConfig = Field(default_factory=DataConfig, description="the images")
    diffusion: DiffusionConfig = Field(default_factory=DiffusionConfig, description="what is learned")
    model: ModelConfig = Field(default_factory=ModelConfig, description="the UNet")
    train: TrainConfig = Field(default_factory=TrainConfig, description="the training loop")

    def to_dict(self) -> dict[str, Any]:
        """Plain scalars, lists and dicts: what goes into ``run.yaml`` and into checkpoints."""
        return self.model_dump(mode="python")


def known_keys() -> list[str]:
    """Every dotted key of a run file: ``device``, ``data.size``, ..."""
    keys = []
    for name, field in RunConfig.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            keys += [f"{name}.{sub}" for sub in kind.model_fields]
        else:
            keys.append(name)
    return keys
