from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from ddpmctl.config import RunConfig, known_keys
from ddpmctl.errors import ConfigError, Exit
from ddpmctl.parsing import parse_size
from ddpmctl.rules import check_size
from ddpmctl.runfile import Layer, config_layer, flag_layer, read_run_file, resolve, to_yaml


@pytest.fixture
def run_file(tmp_path):
    """Writes a run file and returns its path."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def read(path: Path) -> RunConfig:
    return resolve(read_run_file(path))


def fault(path: Path) -> str:
    """What is wrong with a run file, its folder left out."""
    with pytest.raises(ConfigError) as caught:
        read(path)
    error = caught.value
    assert error.exit_code == Exit.CONFIG
    assert error.advice
    for line in (error.problem, error.advice):
        assert "\n" not in line
        assert len(line) < 500
    return error.problem.replace(str(path), "run.yaml")


def settings(**sections: object) -> RunConfig:
    return RunConfig.model_validate(sections)


@pytest.mark.parametrize(
    "text", ["", "\n \n", "# nothing yet\n", "---\n", "train:\n", "train: ~\ndata: null\nmodel: Null\n", "{}"]
)
def test_file_without_settings_gives_the_defaults(run_file, text):
    assert read(run_file(text)) == RunConfig()


def test_file_of_settings(run_file):
    config = read(
        run_file(
            "device: cpu\n"
            "seed: 1_000\n"
            "data: {size: 48x64, hflip: yes, path: ~/a b, background: '#fff'}\n"
            "diffusion:\n"
            "  schedule: cosine\n"
            "model:\n"
            "  channel_mults: [1, 2]\n"
            "  time_embedding: none\n"
            "train:\n"
            "  steps: 1.5M\n"
            "  batch_size: 1e2\n"
            "  lr: 2e-4  # YAML reads 2e-4 as a word\n"
            "  weight_decay: 1.0e-2\n"
            "  ema_decay: .99\n"
        )
    )
    assert (config.device, config.seed, config.data.size, config.data.hflip) == ("cpu", 1000, (48, 64), True)
    assert (config.data.path, config.data.background) == ("~/a b", "#fff")
    assert (config.diffusion.schedule, config.diffusion.timesteps) == ("cosine", 1000)
    assert (config.model.channel_mults, config.model.time_embedding) == ([1, 2], "none")
    assert (config.train.steps, config.train.batch_size) == (1_500_000, 100)
    assert (config.train.lr, config.train.weight_decay, config.train.ema_decay) == (2e-4, 0.01, 0.99)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("device: cpu\nsteps: 5\n", "run.yaml:2: steps: no such key; did you mean 'train.steps'?"),
        (
            "train:\n  lr: 1\n  stepps: 5\n",
            "run.yaml:3: train.stepps: no such key; did you mean 'train.steps'?",
        ),
        ("train:\n  size: 5\n", "run.yaml:2: train.size: no such key; did you mean 'data.size'?"),
        ("devise: cpu\n", "run.yaml:1: devise: no such key; did you mean 'device'?"),
        ("\ntrian:\n  steps: 5\n", "run.yaml:2: trian: no such key; did you mean 'train'?"),
        ("xyzzy: 1\n", "run.yaml:1: xyzzy: no such key"),
        ("xyzzy: {a: {b: c}}\n", "run.yaml:1: xyzzy: no such key"),
        ("train: 5\n", "run.yaml:1: train is a section of keys"),
        ("train: [5]\n", "run.yaml:1: train is a section of keys"),
        ("train: ''\n", "run.yaml:1: train is a section of keys"),
        ("- a\n- b\n", "run.yaml:1: the run file holds no keys"),
        ("hello\n", "run.yaml:1: the run file holds no keys"),
        ("device: cpu\n[a, b]: c\n", "run.yaml:2: a key of the run file is not a word"),
        ("? {a: b}\n: c\n", "run.yaml:1: a key of the run file is not a word"),
        ("model:\n  dropout: {a: 1}\n", "run.yaml:2: model.dropout: nested too deep"),
        ("device: {a: 1}\n", "run.yaml:1: device: nested too deep"),
        ("model: {channel_mults: [[1]]}\n", "run.yaml:1: model.channel_mults: nested too deep"),
        ("seed: 1\ndevice: cpu\nseed: 2\n", "run.yaml:3: seed is given twice"),
        ("train: {lr: 1}\ntrain:\n  lr: 2\n", "run.yaml:3: train.lr is given twice"),
        ("train.lr: 1\ntrain: {lr: 1}\n", "run.yaml:2: train.lr is given twice"),
        ("train:\n  steps: many\n", "run.yaml:2: train.steps: 'many' is not a whole number such as"),
        ("train:\n  steps: -5\n", "run.yaml:2: train.steps: -5 is not a whole number such as"),
        ("train:\n  lr_warmup: -5\n", "run.yaml:2: train.lr_warmup: -5 is not a whole number such as"),
        ("train:\n  steps: 0\n", "run.yaml:2: train.steps: must be at least 1, not 0"),
        ("train:\n  batch_size: 2M\n", "run.yaml:2: train.batch_size: must be at most 1,000,000, not '2M'"),
        ("train:\n  lr: 0\n", "run.yaml:2: train.lr: must be more than 0, not 0"),
        ("train:\n  lr: .inf\n", "run.yaml:2: train.lr: must be a finite number, not inf"),
        ("model: {channel_mults: '1,2'}\n", "run.yaml:1: model.channel_mults: must be a list: [1, 2], not '1,2'"),
        ("model: {channel_mults: 4}\n", "run.yaml:1: model.channel_mults: must be a list: [4], not 4"),
        ("model: {channel_mults: wide}\n", "run.yaml:1: model.channel_mults: must be a list: [1, 2], not 'wide'"),
        ("model: {channel_mults: []}\n", "run.yaml:1: model.channel_mults: must be a list of 1 or more, not []"),
        ("train:\n\n  lr: fast\n", "run.yaml:3: train.lr: must be a number, not 'fast'"),
        ("train: {lr: yes}\n", "run.yaml:1: train.lr: True is not a number"),
        ("train: {lr:}\n", "run.yaml:1: train.lr: must be a number, not None"),
        ("model:\n  dropout: 1\n", "run.yaml:2: model.dropout: must be less than 1, not 1"),
        (
            "model: {time_embedding: 7}\n",
            "run.yaml:1: model.time_embedding: 7 is not auto, none or an even number",
        ),
        ("data: {hflip: 7}\n", "run.yaml:1: data.hflip: must be true or false, not 7"),
        (
            "data: {on_bad: panic}\n",
            "run.yaml:1: data.on_bad: must be 'skip' or 'error', not 'panic'",
        ),
        ("device: gpu\n", "run.yaml:1: device: 'gpu' is not a device: auto, cpu, cuda, cuda:N or mps"),
        (
            "diffusion: {schedule: cosin}\n",
            "run.yaml:1: diffusion.schedule: 'cosin' is not one of linear, cosine, sigmoid; did you mean 'cosine'?",
        ),
        ("seed: a\ntrain:\n  steps: b\n  lr: c\n", "run.yaml:1: seed: 'a' is not a whole number"),
        (
            "model: {attention_levels: [4]}\n",
            "run.yaml:1: model.attention_levels: [4] names a level that is not there",
        ),
        ("model: {num_res_blocks: [0, 1]}\n", "run.yaml:1: model.num_res_blocks: [0, 1] is for 2 levels"),
        ("model: {num_res_blocks: [0, 1, 1, -1]}\n", "run.yaml:1: model.num_res_blocks"),
        ("model: {base_channels: 31, norm: none}\n", "run.yaml:1: model.base_channels: 31 is odd"),
        ("model: {norm_groups: 24}\n", "run.yaml:1: model.norm_groups: 24 does not divide the channels"),
        ("train: {batch_size: 4, grad_accum: 5}\n", "run.yaml:1: train.grad_accum: 5 parts of a batch of 4"),
    ],
)
def test_fault_names_file_line_key_and_the_nearest_known_one(run_file, text, problem):
    assert fault(run_file(text)).startswith(problem)


@pytest.mark.parametrize(("base", "groups", "advised"), [(20, 32, 4), (8, 32, 8), (12, 8, 4), (2, 32, 2), (6, 4, 2)])
def test_advised_groups_divide_every_width(base, groups, advised):
    settings = {"model.base_channels": base, "model.channel_mults": [1, 3], "model.norm_groups": groups}
    with pytest.raises(ConfigError) as caught:
        resolve(flag_layer(settings))
    assert caught.value.advice.endswith(f"such as {advised}")
    resolve(flag_layer(settings | {"model.norm_groups": advised}))


@pytest.mark.parametrize("key", known_keys())
@pytest.mark.parametrize("style", ["block", "flow"])
def test_every_key_is_named_when_its_value_is_wrong(run_file, key, style):
    section, _, name = key.rpartition(".")
    entry = f"{name}: {{bad: 1}}"
    if not section:
        text = f"\n\n{entry}\n"
    else:
        text = f"\n{section}:\n  {entry}\n" if style == "block" else f"\n\n{section}: {{{entry}}}\n"
    assert fault(run_file(text)).startswith(f"run.yaml:3: {key}: nested too deep")


@pytest.mark.parametrize("key", [key for key in known_keys() if "." in key])
def test_key_without_its_section_is_put_right(run_file, key):
    name = key.rpartition(".")[2]
    assert fault(run_file(f"{name}: 1\n")) == f"run.yaml:1: {name}: no such key; did you mean '{key}'?"


@pytest.mark.parametrize(
    ("text", "others"),
    [
        ("seed: a", None),
        ("model: {channel_mults: [0, x, 0]}", None),
        ("seed: a\ntrain: {lr: c}", 1),
        ("seed: a\ntrain: {lr: c, steps: b}\ndevice: d", 3),
    ],
)
def test_fault_counts_the_other_keys_that_are_wrong(run_file, text, others):
    more = re.search(r" \(and (\d+) more\)$", fault(run_file(text)))
    assert (more and int(more[1])) == others


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("train:\n\tsteps: 5\n", 2),
        ("train:\n  steps: 5\n lr: 1\n", 3),
        ("seed: 1\ntrain: {steps: 5\n", 3),
        ('device: "cpu\n', 2),
        ("device: cpu: x\n", 1),
        ("seed: 1\ndevice: *nowhere\n", 2),
        ("seed: 1\n---\nseed: 2\n", 2),
        ("seed: 1\ndevice: @x\n", 2),
    ],
)
def test_broken_yaml_is_placed(run_file, text, line):
    assert re.match(rf"run\.yaml:{line}: not YAML: \w", fault(run_file(text)))


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_file_that_cannot_be_read(tmp_path, name):
    assert "cannot be read" in fault(tmp_path / name)


def test_dates_and_signs_stay_words(run_file):
    config = read(run_file("data:\n  path: 2024-05-01\n  background: =\n"))
    assert (config.data.path, config.data.background) == ("2024-05-01", "=")


@pytest.mark.parametrize("name", ["007", "2024", "1_000", "0x10", "1.50", "12:30", "1e5", "on", "No", ".5", "!!int 5"])
def test_the_name_of_a_folder_stays_as_it_is_written(run_file, name):
    name, tag = name.removeprefix("!!int "), "!!int " if "!!" in name else ""
    assert read(run_file(f"data: {{path: {tag}{name}}}\n")).data.path == name
    assert resolve(flag_layer({}, [f"data.path={tag}{name}"])).data.path == name


@pytest.mark.parametrize("name", ["a\\0b", "\\ud800"])
def test_what_no_folder_can_be_called(run_file, name):
    problem = fault(run_file(f'seed: 1\ndata:\n  path: "{name}"\n'))
    assert re.fullmatch(r"run\.yaml:3: data\.path: '.*' cannot be the name of a folder or file", problem)
    with pytest.raises(ConfigError, match=r"^x\.pt: data\.path: '.*' cannot be the name"):
        resolve(config_layer({"data": {"path": name.encode().decode("unicode_escape")}}, "x.pt"))


BIG = "0x" + "f" * 9000
LAUGHS = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" if i else "a0: &a0 [lol]" for i in range(12))
HOSTILE = {
    "nothing": "~",
    "billion laughs": LAUGHS,
    "laughs in a value": "model: {channel_mults: " + "[" * 40 + "1" + "]" * 40 + "}",
    "anchor": "train: {steps: &n 5, keep: *n}",
    "anchor twice": "seed: &x 1\ndevice: &x cpu",
    "mapping within itself": "model: &a {dropout: *a}",
    "file within itself": "&a {train: *a}",
    "list within itself": "model: {channel_mults: &s [*s]}",
    "merge": "<<: {device: cpu}",
    "merge in a section": "train: {<<: {steps: 5}}",
    "python object": "device: !!python/object/apply:os.system ['echo pwned > pwned']",
    "python name": "device: !!python/name:os.system",
    "python object as file": "!!python/object/new:os.system [echo]",
    "python tuple": "model: {channel_mults: !!python/tuple [1, 2]}",
    "unknown tag": "seed: !secret 3",
    "empty int": "seed: !!int ''",
    "empty float": "train: {lr: !!float ''}",
    "sign only": "seed: !!int '-'",
    "no bool": "data: {hflip: !!bool perhaps}",
    "no date": "device: !!timestamp soon",
    "impossible date": "device: 2001-13-45",
    "binary": "device: !!binary aGVsbG8=",
    "no binary": "device: !!binary ä",
    "set": "train: !!set {steps, lr}",
    "scalar list": "model: {channel_mults: !!seq x}",
    "scalar map": "device: !!map x",
    "scalar omap": "device: !!omap x",
    "word map": "device: !!str {a: 1}",
    "null key": "~: 5",
    "empty key": "'': 5",
    "true key": "yes: 5",
    "number key": "1: 5",
    "key of two lines": '"a\\nb": 5',
    "key of colours": '"\\e[31mseed": 5',
    "long key": "? " + "x" * 5000 + "\n: 5",
    "longest key": "x" * 2000 + ": 5",
    "deep list": "[" * 5000,
    "deep map": "{a: " * 5000,
    "deep blocks": "\n".join(" " * i + "a:" for i in range(900)),
    "control character": "device: \x01",
    "nul": "device: 'cpu\x00'",
    "nul by escape": 'data: {path: "a\\0b"}',
    "colour by escape": 'device: "\\e[31mred"',
    "lone surrogate": 'data: {path: "\\ud800"}',
    "too large a character": 'device: "\\UFFFFFFFF"',
    "unknown escape": 'device: "\\q"',
    "yaml 9": "%YAML 9.9\n---\nseed: 1",
    "unknown directive": "%FOO bar\n---\nseed: 1",
    "two documents": "seed: 1\n---\nseed: 2",
    "byte order mark": "\ufeffseed: 1",
    "carriage returns": "seed: 1\rdevice: cpu\r\n",
    "utf-16": "seed: 1".encode("utf-16"),
    "latin-1": "data: {path: Äpfel}".encode("latin-1"),
    "png": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
    "zeros": bytes(1000),
    "every byte": bytes(range(256)),
    "large file": "#" * (1 << 20),
    "too large a file": "#" * ((1 << 20) + 1),
    "long word": "device: " + "a" * 900_000,
    "long list": "model: {channel_mults: [" + "1," * 10_000 + "1]}",
    "many digits": "seed: " + "9" * 9000,
    "many sixtieths": "seed: " + ":".join(["59"] * 3000),
    "many sixtieths of a float": "train: {lr: " + ":".join(["59"] * 3000) + ".5}",
    "infinity": "train: {lr: .inf}",
    "not a number": "train: {lr: .nan}",
    "list for word": "device: [cpu]",
    "list of null": "model: {channel_mults: [~]}",
    "huge network": "model: {base_channels: 9223372036854775806, norm: none}",
    **{f"big number for {key}": f"{key}: {BIG}" for key in known_keys()},
    **{f"list of big numbers for {key}": f"{key}: [{BIG}]" for key in known_keys()},
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_file_is_refused_in_one_line_or_fine(run_file, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = run_file(text)
    try:
        assert isinstance(read(path), RunConfig)
    except ConfigError:
        fault(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    "name",
    [
        "python object",
        "python name",
        "python object as file",
        "unknown tag",
        "binary",
        "billion laughs",
        "deep list",
    ],
)
def test_the_worst_of_them_are_refused(run_file, name):
    fault(run_file(HOSTILE[name]))


def test_flags_beat_the_file_and_the_file_the_defaults(run_file):
    layer = read_run_file(run_file("seed: 1\ntrain: {steps: 10, lr: 0.5}\n"))
    config = resolve(layer, flag_layer({"train.steps": 20, "seed": None, "device": None}))
    assert (config.train.steps, config.seed, config.train.lr) == (20, 1, 0.5)
    assert (config.device, config.train.keep) == (RunConfig().device, RunConfig().train.keep)


def test_set_beats_its_own_flag():
    assert resolve(flag_layer({"train.steps": 20}, ["train.steps=30"])).train.steps == 30


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("train.steps=5k", "train.steps", "5k"),
        ("train.steps = 5", "train.steps", 5),
        ("train.lr=2e-4", "train.lr", "2e-4"),
        ("model.channel_mults=[1, 2]", "model.channel_mults", [1, 2]),
        ("data.hflip=on", "data.hflip", True),
        ("data.path=a=b", "data.path", "a=b"),
        ("data.path='x: y'", "data.path", "x: y"),
        ("data.path=2024-05-01", "data.path", "2024-05-01"),
        ("data.path=", "data.path", None),
        ("data.path=null", "data.path", None),
        ("seed=3", "seed", 3),
    ],
)
def test_set(word, key, value):
    layer = flag_layer({}, [word])
    assert layer.values == {key: value}
    assert layer.origins == {key: f"--set {key}"}
    resolve(layer)


@pytest.mark.parametrize(
    "word",
    ["", "=", "=5", "seed", "seed 5", "seed=a", "seed=[", "seed={a: 1}", "seed=!!int ''",
     "seed=!!python/name:os.system",
     "seed=*x", "seed=@", "seed=\x00", "seed=1\n---\n2", f"seed={BIG}", "seed=" + "[" * 5000, "trian.steps=5",
     "steps=5",
     "train=5", "train={steps: 5}", "seed=" + ":".join(["59"] * 3000)],
)  # fmt: skip
def test_what_is_no_set(word):
    with pytest.raises(ConfigError) as caught:
        resolve(flag_layer({}, [word]))
    assert caught.value.problem.startswith("--set ")


@pytest.mark.parametrize(
    ("layer", "problem"),
    [
        (flag_layer({"train.batch_size": 0}), "--batch-size: must be at least 1"),
        (flag_layer({"device": "gpu"}), "--device: 'gpu' is not a device"),
        (flag_layer({}, ["train.batch_size=0"]), "--set train.batch_size: must be at least 1"),
        (
            config_layer({"train": {"lr": -1}, "seed": 3}, "last.pt"),
            "last.pt: train.lr: must be more than 0",
        ),
        (config_layer({"train": {"new": 1}}, "last.pt"), "last.pt: train.new: no such key"),
        (Layer({"seed": "x"}), "seed: 'x' is not a whole number"),
    ],
)
def test_fault_names_where_the_value_came_from(layer, problem):
    with pytest.raises(ConfigError, match=f"^{re.escape(problem)}"):
        resolve(layer)


def test_fault_of_a_value_that_was_overruled_is_no_fault(run_file):
    layer = read_run_file(run_file("seed: x\n"))
    assert resolve(layer, flag_layer({"seed": 4})).seed == 4


def test_config_of_a_checkpoint_comes_back():
    config = settings(seed=5, data={"size": "48x64"}, model={"time_embedding": None}, train={"lr": 1e-5})
    assert resolve(config_layer(config.to_dict(), "last.pt")) == config


SPECIAL = [
    "a: b", "a # b", "#fff", "null", "~", "yes", "no", "007", "1e5", "0x10", "2024-05-01", "1:30", " lead",
    "trail ", "", "two\nlines", "\n", "tab\tbed", "'quoted'", '"doubly"', "back\\slash", "{flow}", "[list]",
    "*star", "&and", "!bang", "%percent", "@at", "`tick", "- dash", "? what", "Äpfel 🍎", "\x07bell",
    "\u2028line", "\udcff", "<<", "=", "very long " * 60, "|", ">", "---", "...",
]  # fmt: skip


@pytest.mark.parametrize("comments", [False, True])
@pytest.mark.parametrize("path", SPECIAL)
def test_words_of_any_kind_survive_a_run_file(run_file, path, comments):
    config = settings(data={"path": path, "background": path})
    assert read(run_file(to_yaml(config, comments=comments))) == config


@pytest.mark.parametrize("comments", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        RunConfig(),
        settings(data={"size": "auto", "channels": 3, "workers": 2, "hflip": True, "max_bad": 0}),
        settings(data={"size": (48, 64)}, model={"attention_levels": [], "time_embedding": "none", "norm": "none"}),
        settings(train={"lr": 1e-5, "weight_decay": 1e-10, "ema_decay": 0.1 + 0.2}, seed=2**63 - 1),
        settings(model={"channel_mults": [1], "attention_levels": [0], "time_embedding": 64, "padding": 3}),
        settings(
            device="cuda:1",
            precision="bf16",
            diffusion={"schedule": "sigmoid", "prediction": "v", "loss": "huber"},
        ),
    ],
)
def test_written_run_file_reads_back_equal(run_file, config, comments):
    text = to_yaml(config, comments=comments)
    assert read(run_file(text)) == config
    assert set(read_run_file(run_file(text)).values) == set(known_keys())


def test_comments_stand_beside_every_key():
    plain, commented = (to_yaml(RunConfig(), comments=comments).splitlines() for comments in (False, True))
    assert all("  # " in line for line in commented)
    assert [line.partition("  # ")[0].rstrip() for line in commented] == plain


def advised(error: ConfigError) -> list[tuple[str | None, int | None]]:
    """The sizes, or paddings, that an error about the size advises."""
    sizes = re.search(r"--size ([\dx]+)(?: or ([\dx]+))?", error.advice)
    padding = re.search(r"--set model\.padding=(\d+)", error.advice)
    ways: list[tuple[str | None, int | None]] = [(size, None) for size in sizes.groups() if size] if sizes else []
    return [*ways, (None, int(padding[1]))] if padding else ways


@pytest.mark.parametrize("padding", [0, 1, 2, 5, 64])
@pytest.mark.parametrize("levels", [1, 2, 3, 4, 6, 8])
def test_every_size_and_padding_that_is_advised_fits(levels, padding):
    model = {"channel_mults": [1] * levels, "attention_levels": [], "padding": padding}
    config = settings(model=model)
    sides = (1, 2, 7, 8, 28, 30, 31, 64, 100, 127, 4096)
    for size in itertools.product(sides, sides):
        fits = all((side + 2 * padding) % 2 ** (levels - 1) == 0 for side in size)
        if fits:
            check_size(config, size)
            continue
        with pytest.raises(ConfigError, match="do not halve evenly") as caught:
            check_size(config, size)
        ways = advised(caught.value)
        assert ways
        for better_size, better_padding in ways:
            better = settings(model={**model, "padding": padding if better_padding is None else better_padding})
            check_size(better, parse_size(better_size) if better_size else size)


@pytest.mark.parametrize(
    ("size", "levels", "padding", "problem", "advice"),
    [
        (
            (28, 28),
            4,
            0,
            "data.size: 28 pixels do not halve evenly 3 times",
            "use --size 24 or 32, or --set model.padding=2,",
        ),
        (
            (32, 30),
            4,
            0,
            "data.size: 30 pixels do not halve evenly 3 times",
            "use --size 32x24 or 32, or fewer",
        ),
        (
            (64, 64),
            4,
            1,
            "data.size: 64 pixels with padding 1 do not",
            "use --size 62 or 70, or --set model.padding=0,",
        ),
        ((3, 3), 4, 0, "data.size: 3 pixels do not halve evenly 3 times", "use --size 8, or fewer"),
        ((27, 27), 3, 0, "data.size: 27 pixels do not halve evenly 2 times", "use --size 24 or 28, or fewer"),
    ],
)
def test_size_that_does_not_halve_evenly(size, levels, padding, problem, advice):
    config = settings(model={"channel_mults": [1] * levels, "attention_levels": [], "padding": padding})
    with pytest.raises(ConfigError) as caught:
        check_size(config, size)
    assert caught.value.problem.startswith(problem)
    assert caught.value.advice.startswith(advice)
    assert caught.value.advice.endswith("or fewer model.channel_mults")


def test_size_that_does_not_go_into_patches():
    config = settings(model={"channel_mults": [1, 1], "attention_levels": [], "patch": 3})
    check_size(config, (24, 30))
    with pytest.raises(ConfigError) as caught:
        check_size(config, (32, 30))
    assert caught.value.problem == "data.size: 32 pixels are not a multiple of 6, for model.patch 3 halved 1 times"
    assert caught.value.advice == ("use --size 30 or 36x30, or a smaller model.patch, or fewer model.channel_mults")


@pytest.mark.parametrize(("size", "padding"), [((64, 64), 0), ((8, 64), 0), ((28, 28), 2), ((30, 62), 1)])
def test_size_that_halves_evenly(size, padding):
    check_size(settings(model={"padding": padding}), size)
