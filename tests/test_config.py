from __future__ import annotations

import math
import re
import subprocess
import sys

import pytest
from pydantic import ValidationError

from ddpmctl import config as config_module
from ddpmctl.config import RunConfig, Section, known_keys
from ddpmctl.parsing import parse_count, parse_device, parse_duration, parse_size, size_text
from ddpmctl.rows import row_names

TABLES = {
    "diffusion.schedule": ("core.schedule", "SCHEDULES"),
    "diffusion.prediction": ("core.prediction", "PREDICTIONS"),
    "diffusion.loss": ("core.losses", "LOSSES"),
    "diffusion.weighting": ("core.losses", "WEIGHTINGS"),
    "diffusion.t_sampling": ("core.draws", "T_SAMPLINGS"),
    "model.norm": ("core.unet", "NORMS"),
    "model.activation": ("core.unet", "ACTIVATIONS"),
    "train.optimizer": ("core.optim", "OPTIMIZERS"),
    "train.lr_schedule": ("core.optim", "LR_SCHEDULES"),
    "train.ema_warmup": ("core.ema", "WARMUPS"),
    "train.sampler": ("core.samplers", "SAMPLERS"),
    "data.fit": ("data.decode", "FITS"),
}


def fields() -> dict[str, tuple[type[Section], str]]:
    """Dotted key -> (section, name within it)."""
    found = {}
    for key in known_keys():
        section, _, name = key.rpartition(".")
        kind = RunConfig.model_fields[section].annotation if section else RunConfig
        found[key] = (kind, name)
    return found


def validate(key: str, value: object) -> object:
    """What a run configuration makes of one value."""
    section, _, name = key.rpartition(".")
    config = RunConfig.model_validate({section: {name: value}} if section else {name: value})
    return getattr(getattr(config, section) if section else config, name)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (7, 7),
        (0, 0),
        ("0", 0),
        ("500", 500),
        (" 500 ", 500),
        ("1_000", 1000),
        ("100k", 100_000),
        ("2.5k", 2500),
        ("1.5M", 1_500_000),
        ("1.1m", 1_100_000),
        ("0.5k", 500),
        ("2B", 2 * 10**9),
        ("1e5", 100_000),
        ("1E+5", 100_000),
        ("1.5e3", 1500),
        (1e5, 100_000),
        (64.0, 64),
        ("5.", 5),
        (2**63 - 1, 2**63 - 1),
        (str(2**63 - 1), 2**63 - 1),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_counts_as_people_write_them(text, number):
    found = parse_count(text)
    assert found == number
    assert type(found) is int


@pytest.mark.parametrize(
    "text",
    [
        -1, "-1", 0.5, "0.5", "1.0001k", "1e-3", "0.0000001", True, False, None, math.nan, math.inf,
        -math.inf, "nan", "inf", "abc", "", " ", "k", "_1", "1kk", "1 k", "1k5", "1,000", "0x10", "1e",
        "e5", ".5", "1.5", "٣.٥", [], [5], {}, 2**63, 10**400, "1e19", "1e400", "1e99999999999", "9" * 5000,
        "10B" * 2, "1." + "0" * 30 + "1", "1." + "0" * 30 + "1k", "1e" + "9" * 3,
    ],
)  # fmt: skip
def test_what_is_no_count(text):
    with pytest.raises(ValueError, match="is not a whole number") as caught:
        parse_count(text)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("text", ["9" * 400 + "d", "9" * 5000 + "h", "9" * 400 + ":00:00", "", "0s", "5", "h", "-1h", "1:60:00"])
def test_what_is_no_time(text):
    with pytest.raises(ValueError, match="is not a time such as") as caught:
        parse_duration(text)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("auto", "auto"),
        (64, (64, 64)),
        ("64", (64, 64)),
        ("48x64", (48, 64)),
        ("48X64", (48, 64)),
        ("48×64", (48, 64)),
        (" 48x64 ", (48, 64)),
        ([48, 64], (48, 64)),
        ((48, 64), (48, 64)),
        (1, (1, 1)),
        (4096, (4096, 4096)),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [0, -64, 4097, "0x64", "64x0", "64x", "x64", "64 x 64", "64x64x3", "48.5", 64.0, True, [64], [64, 64, 3],
     ["48", "64"], [True, 64], [0, 64], None, {}, "", "AUTO ", "big", "9" * 7],
)  # fmt: skip
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match=r"is not a size|out of range"):
        parse_size(text)


@pytest.mark.parametrize("size", ["auto", (64, 64), (48, 64), (1, 4096)])
def test_size_is_written_as_it_is_read(size):
    assert parse_size(size_text(size)) == size
    config = RunConfig.model_validate({"data": {"size": size}})
    assert config.data.size == size
    assert config.to_dict()["data"]["size"] == size_text(size)


@pytest.mark.parametrize("text", ["auto", "cpu", "cuda", "cuda:0", "cuda:17", "cuda:127", "mps"])
def test_devices(text):
    assert parse_device(text) == text


@pytest.mark.parametrize(
    "text",
    ["gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "CUDA", "", None, 0, True, "cuda:0 ", "cuda:01", "cuda:128", "cuda:256",
     "cuda:999", "cuda:\u0661"],
)  # fmt: skip
def test_what_is_no_device(text):
    with pytest.raises(ValueError, match="is not a device"):
        parse_device(text)


@pytest.mark.parametrize(
    ("text", "channels"),
    [("auto", "auto"), (1, 1), (3, 3), ("4", 4), ("grey", 1), ("gray", 1), ("rgb", 3), ("RGBA", 4)],
)
def test_channels(text, channels):
    assert validate("data.channels", text) == channels


@pytest.mark.parametrize("text", [0, 2, 5, True, None, "bgr", [3], {}, "", 1.5])
def test_what_is_no_channels(text):
    with pytest.raises(ValidationError, match="is not auto, 1"):
        validate("data.channels", text)


@pytest.mark.parametrize(
    ("text", "width"),
    [("auto", "auto"), ("none", "none"), (None, "none"), (2, 2), ("512", 512), ("1k", 1000), (32_768, 32_768)],
)
def test_time_embedding(text, width):
    assert validate("model.time_embedding", text) == width


@pytest.mark.parametrize("text", [0, 1, 3, -2, True, "wide", 2.5, [], 32_770, 10**18])
def test_what_is_no_time_embedding(text):
    with pytest.raises(ValidationError, match=r"model\.time_embedding"):
        validate("model.time_embedding", text)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.lr", "2e-4", 2e-4),
        ("train.lr", 1, 1.0),
        ("train.steps", "1.5M", 1_500_000),
        ("diffusion.timesteps", 2, 2),
        ("seed", 2**63 - 1, 2**63 - 1),
        ("model.attention_levels", [], []),
        ("model.channel_mults", [1, "2", 4], [1, 2, 4]),
        ("data.max_bad", 1, 1.0),
        ("train.lr_warmup", 0, 0),
    ],
)
def test_values_within_range(key, text, value):
    found = validate(key, text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("diffusion.timesteps", 1), ("diffusion.timesteps", 100_001), ("model.base_channels", 0),
        ("seed", -1), ("seed", 2**63), ("model.channel_mults", []), ("model.channel_mults", [1] * 9),
        ("model.channel_mults", [0]), ("model.channel_mults", 4), ("model.channel_mults", "1,2"),
        ("model.attention_levels", [-1]), ("model.attention_levels", [True]),
        ("model.attention_levels", [0.5]), ("model.dropout", 1), ("model.dropout", -0.1),
        ("model.dropout", "nan"), ("model.padding", -1), ("model.padding", 65), ("model.time_scale", 0),
        ("model.time_scale", math.inf), ("train.steps", 0), ("train.lr", 0), ("train.lr", -1),
        ("train.lr", "fast"), ("train.lr", math.nan), ("train.lr", math.inf), ("train.lr", True),
        ("train.beta1", 1), ("train.ema_decay", 1), ("train.weight_decay", -1),
        ("train.weight_decay", True), ("train.lr_warmup", -1), ("train.sample_every", -1),
        ("train.samples", 0), ("train.samples", 1025), ("train.grad_clip", math.inf),
        ("data.hflip", "maybe"), ("data.hflip", 2), ("data.max_bad", 1.1), ("data.workers", 0),
        ("data.workers", 1025), ("data.workers", "some"), ("data.on_bad", "ignore"), ("precision", "fp8"),
    ],
)  # fmt: skip
def test_values_out_of_range(key, value):
    with pytest.raises(ValidationError, match=re.escape(key)):
        validate(key, value)


@pytest.mark.parametrize("key", [None, *sorted({key.partition(".")[0] for key in known_keys() if "." in key})])
def test_unknown_keys_are_refused(key):
    with pytest.raises(ValidationError, match="extra"):
        RunConfig.model_validate({key: {"nonsense": 1}} if key else {"nonsense": 1})


def test_settings_do_not_change_after_validation():
    config = RunConfig()
    with pytest.raises(ValidationError):
        config.seed = 3
    with pytest.raises(ValidationError):
        config.train.lr = 1.0


def test_defaults_are_the_paper_s():
    config = RunConfig()
    assert (config.diffusion.timesteps, config.diffusion.schedule, config.diffusion.loss) == (
        1000,
        "linear",
        "l2",
    )
    assert (config.model.base_channels, config.model.channel_mults, config.train.lr) == (
        128,
        [1, 2, 2, 2],
        2e-4,
    )


@pytest.mark.parametrize("key", known_keys())
def test_every_key_says_what_it_means(key):
    section, name = fields()[key]
    description = section.model_fields[name].description
    assert description, key
    assert "\n" not in description
    assert len(description) < 110


@pytest.mark.parametrize(("key", "table"), TABLES.items())
def test_descriptions_list_every_choice_in_order(key, table):
    section, name = fields()[key]
    words = re.sub(r"\([^)]*\)", "", section.model_fields[name].description).replace(":", " ").replace(",", " ")
    listed = re.findall(r"[\w+]+(?=\s*\|)|(?<=\|)\s*[\w+]+", words)
    names = row_names(*table)
    if key == "train.sampler":  # listed with the default first
        assert sorted(word.strip() for word in listed) == sorted(names)
    else:
        assert tuple(word.strip() for word in listed) == names


@pytest.mark.parametrize(("key", "table"), TABLES.items())
def test_every_row_is_a_choice_and_nothing_else(key, table):
    for name in row_names(*table):
        assert validate(key, name) == name
    with pytest.raises(ValidationError, match=f"did you mean '{row_names(*table)[0]}'"):
        validate(key, row_names(*table)[0] + "_")


def test_every_choice_of_rows_is_tested_here():
    checked = {kind for kind in vars(config_module).values() if "_row.<locals>.check" in repr(kind)}
    assert len(checked) == len(TABLES) + 1  # train.log is a list: see test_boards.py


def test_plain_settings_round_trip():
    config = RunConfig.model_validate(
        {"data": {"size": "48x64", "channels": "grey"}, "model": {"time_embedding": None}}
    )
    plain = config.to_dict()
    assert RunConfig.model_validate(plain) == config

    def leaves(value: object) -> list[object]:
        if isinstance(value, dict):
            return [leaf for item in value.values() for leaf in leaves(item)]
        return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else [value]

    assert {type(leaf) for leaf in leaves(plain)} <= {str, int, float, bool, type(None)}


def test_known_keys_are_every_key_once():
    keys = known_keys()
    assert len(set(keys)) == len(keys)
    assert {"device", "seed", "data.size", "diffusion.timesteps", "model.dropout", "train.lr"} <= set(keys)
    assert "train" not in keys


@pytest.mark.parametrize("module", ["ddpmctl", "ddpmctl.errors", "ddpmctl.rows", "ddpmctl.config", "ddpmctl.runfile"])
def test_settings_are_read_without_torch(module):
    code = f"import sys, {module}; print({{'torch', 'numpy', 'matplotlib'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
