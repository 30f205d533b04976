"""Random command lines for every command, over a small world of files that are right, wrong or not there."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import NamedTuple

from file_inputs import images
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from PIL import Image

from ddpmctl.cli import main
from helpers import TINY, write_images

_WORDS = ["", "0", "true", "null", "[]", "a=b", "=", "--", "-", "-x", "--nothing", "\U0001f4a5", "%s%n", "{0}", "[bold]x[/]", "[/]", "\udcff", "e\u0301",
          "auto", "all", "cuda:01", "cuda:999", "cuda:\u0661", "mps", "gpu", "Linear"]  # fmt: skip
_NUMBERS = ["", "0", "-1", "1.5", "00", "+1", "1e400", "-inf", "inf", "nan", "9" * 19, "9" * 30, "9" * 5000, "0x10", "1,2", "１２x", "½", "1 2", "True", "1k5",
            "5m5", "999999999999999d", "1." + "0" * 30 + "1"]  # fmt: skip
ODD_NAMES = ["a" * 300, "a" * 300 + ".png", "x/" * 3000, "../loop", "../loop.png", "\x1b[31mred.png", "a\nb.png", "a\u202eb.png"]
"""Names that the system does not take, and names that are no text on one line."""

_NO_PLACES = ["", "~", "*", "$HOME", "\udcff.png", "/dev/null/x", "100%.png", "[bold]x.png", "a;b", "--out.png", *ODD_NAMES]

_WRONG = dict.fromkeys(("--out", "--config", "--ckpt", "--init", "--inpaint", "--mask"), _NO_PLACES) | dict.fromkeys(("-n", "--steps", "--batch-size", "--lr", "--size", "--timesteps", "--seed", "--max-time", "--eta", "--columns", "--scale", "--at", "--frames", "--resample", "--strength"), _NUMBERS)  # fmt: skip
"""Values that are wrong for a flag, or nearly so; for the others ``_WORDS``."""

_DEVICES = ["cpu", "auto"]
_COUNTS = ["1", "2", "3", " 2 ", "2e0"]
_PLACES = ["../photos", "../photos.zip", "../cat.png", "../bad.png", "../bad.zip", "../notes.txt", "../tiny.yaml", "../bad.yaml", "../run",
           "../run/checkpoints", "../run/checkpoints/step-00000006.pt", "../run/run.yaml", "../run/metrics.csv", "../bad.pt", "../empty",
           "../nowhere", "../cat.png/below", "../photos/dogs", "../made.png", ".", "old.png", "../run/samples", "../converted.pt", "../converted.safetensors", "../pipe", *_NO_PLACES]  # fmt: skip
_TARGETS = ["new.pt", "new.safetensors", "new", "new/", "taken", "old.png", "../run", "deep/er/new.pt", "old.png/x.pt", "new.ckpt", *ODD_NAMES]
_PICTURES = ["../cat.png", "../made.png", "../cat.png", "../bad.png", "../nowhere.png", "../photos", "../notes.txt"]
_SETTINGS = [
    "train.steps=3", "train.batch_size=2", "data.hflip=on", "data.path=../photos", "data.path=../nowhere", "data.path=~", "data.fit=pad",
    "data.background=red", "data.background=rgb(300,0,0)", "data.background=rde", "data.conditional=true", "data.on_bad=error", "data.max_bad=0",
    "data.size=auto", "data.size=17", "data.workers=2", "data.cache=false", "data.channels=rgba", "model.dropout=0", "model.norm=batch",
    "model.channel_mults=[1]", "model.attention_levels=[]", "model.attention_levels=[7]", "model.base_channels=6", "model.norm_groups=3",
    "train.lr=1e30", "train.grad_accum=2", "train.grad_accum=9", "train.optimizer=adamw", "train.sample_every=0", "diffusion.loss=huber",
    "train.samples=2", "seed=1", "device=cpu", "precision=bf16", "precision=fp16", "train.lr_schedule=cosine", "diffusion.timesteps=100000",
    "data", "data.", ".size=1", "=", "train.steps", "train.stepps=3", "seed=[", "seed=*x", "seed=!!python/name:os.system", "train={steps: 1}",
    "seed=1\n2", "data.path=\udcff", 'data.path="a\\0b"', 'data.path="\\ud800"', "seed=9223372036854775808",
]  # fmt: skip

FLAGS: dict[str, dict[str, list[str] | None]] = {
    "train": {
        "--config": ["../tiny.yaml", "../tiny.yaml", "../bad.yaml", "../nowhere", "../photos", "../cat.png"], "--out": ["new", "runs/x", "old.png", "taken", "../run", "../empty", "old.png/x"],
        "--steps": _COUNTS, "--batch-size": _COUNTS, "--lr": ["1e-3", "2", "1e-300"], "--size": ["16", "16x8", "auto", "8"], "--device": _DEVICES,
        "--precision": ["auto", "fp32", "bf16"], "--timesteps": ["5", "20"], "--schedule": ["linear", "cosine"], "--loss": ["l1", "l2"],
        "--prediction": ["eps", "v", "x0"], "--seed": ["0", "7", "9223372036854775807"], "--set": _SETTINGS, "--max-time": ["1h", "90m", "1-12:00:00"], "--cache": ["on", "off"],
        "--init-from": ["../run", "../converted.pt", "../pipe", "../bad.pt", "../nowhere"], "--resume": None, "--force": None, "--overwrite": None, "--quiet": None,
    },
    "sample": {
        "-n": _COUNTS, "--out": ["new.png", "new.gif", "new.npz", "new/", "new", "taken", "old.png", "deep/er/new.png", "new.jpg", "old.png/x.png", "old.png/"],
        "--sampler": ["ddim", "ddpm", "dpm++", "dpm++sde", "unipc", "heun"], "--quality": ["fast", "balanced", "best"], "--spacing": ["linear", "trailing", "quadratic", "karras", "logsnr"], "--steps": ["1", "2", "20"], "--eta": ["0", "0.5", "1"], "--variance": ["beta", "posterior"],
        "--guidance": ["1", "2"], "--guidance-interval": ["0:1", "0.2:0.8", "1:0"], "--threshold": ["clip", "dynamic", "none"], "--class": ["all", "cats"], "--seed": ["0", "7", "9223372036854775807"], "--batch-size": _COUNTS, "--device": _DEVICES,
        "--precision": ["fp32", "bf16"], "--weights": ["ema", "raw"], "--ema-length": ["0.1", "0.28"], "--columns": _COUNTS, "--scale": ["1", "2"], "--overwrite": None, "--quiet": None,
        "--init": _PICTURES, "--strength": ["0.1", "1", "0"], "--inpaint": _PICTURES, "--mask": ["../half.png", *_PICTURES], "--resample": _COUNTS,
        "--interpolate": [f"{a} {b}" for a in _PICTURES for b in _PICTURES], "--frames": ["2", "3", "1"],
    },
    "noise-demo": {
        "--out": ["new.png", "new.gif", "taken", "old.png", "deep/er/new.png", "new.jpg", "old.png/x.png"], "--schedule": ["linear", "cosine", "sigmoid"],
        "--timesteps": ["5", "20", "1000"], "--at": ["0", "1,2", "0,1,5", "5", "1,,2", ","], "--frames": ["1", "2", "3"], "--size": ["16", "8x24", "auto"],
        "--seed": ["0", "7"], "--ckpt": ["../run", "../bad.pt", "../nowhere", "../cat.png"], "--class": ["cats"], "--overwrite": None, "--quiet": None,
    },
    "inspect": {"--json": None, "--defaults": None, "--quiet": None},
    "convert": {
        "--to": ["ddpmctl", "diffusers", "safetensors", "predecessor", "denoising-diffusion-pytorch"], "--size": ["16", "16x8", "auto"], "--set": _SETTINGS,
        "--weights": ["ema", "raw"], "--overwrite": None, "--quiet": None,
    },
    "cache": {"--clear": None, "--json": None, "--quiet": None},
}  # fmt: skip
"""By command: flags and values that are right or nearly so; None where a flag takes none."""

_GIVEN = {"train": [["../photos"], ["../photos.zip"]], "sample": [["../run"]], "noise-demo": [["../cat.png"]], "inspect": [[place] for place in _PLACES], "convert": [[place, target] for place in _PLACES for target in _TARGETS], "cache": [[]]}  # fmt: skip
_ALWAYS = {
    "train": [("--config", "../tiny.yaml"), ("--dry-run", None)], "sample": [("--steps", "2"), ("-n", "2")],
    "noise-demo": [("--frames", "2"), ("--size", "16")],
}  # fmt: skip
"""What keeps a command short; later flags win."""


_PAIR = "--interpolate"
"""The flag of two words, which stand in one value with a space between."""


class Line(NamedTuple):
    """A command line: its words, and the flags among them as they were meant."""

    words: tuple[str, ...]
    flags: list[tuple[str, str | None]]

    def names(self) -> set[str]:
        """All that an error may name."""
        words = {part for word in self.words[1:] for part in (word, word.partition("=")[0])}
        words |= {part for _, value in self.flags for part in (value or "", *(value or "").split(" "))}
        return words | {str(Path(word)) for word in words}


@st.composite
def lines(draw: DrawFn, command: str) -> Line:
    """A command with a few flags, of which some are wrong, and which may have no value or come twice."""
    known = FLAGS[command]
    given = command == "convert" or draw(st.integers(0, 4))  # with --overwrite it may replace any file that is its second word
    words = [command, *draw(st.sampled_from(_GIVEN[command]) if given else st.lists(st.sampled_from(_PLACES), max_size=2))]
    flags = list[tuple[str, str | None]](_ALWAYS.get(command, []))
    for _ in range(draw(st.integers(0, 4))):
        flag = draw(st.sampled_from(list(known)))
        values = known[flag]
        wrong = draw(st.integers(0, 3)) == 0
        flags.append((flag, None if values is None else draw(st.sampled_from(_WRONG.get(flag, _WORDS) if wrong else values))))
    asked = {flag for flag, _ in flags}
    if _PAIR in asked and draw(st.booleans()):
        flags.remove(("-n", "2"))  # which does not go with it
    if "--inpaint" in asked and draw(st.integers(0, 3)):
        flags.append(("--mask", "../half.png"))
    for flag, value in flags:
        joined = value is not None and flag.startswith("--") and draw(st.integers(0, 3)) == 0
        parts = [] if value is None else value.split(" ", 1) if flag == _PAIR else [value]
        words += [f"{flag}={value}"] if joined else [flag, *parts]
    if draw(st.integers(0, 9)) == 0:
        words.append(draw(st.sampled_from([*known, "--nothing", "-z", "--", "--stepps=5", "--overwrite=1", "--help", "a b", "--version"])))
        flags.append(("?", None))
    return Line(tuple(words), flags)


def make_world(place: Path, run: Path) -> None:
    """Everything that ``_PLACES`` names, seen from ``place/here``."""
    write_images(place / "photos", count=6)
    with zipfile.ZipFile(place / "photos.zip", "w") as archive:
        for file in sorted(place.glob("photos/*/*.png")):
            archive.write(file, file.relative_to(place))
    (place / "cat.png").write_bytes(images()["rgb.png"])
    half = Image.new("L", (16, 16))
    half.paste(255, (0, 0, 8, 16))
    half.save(place / "half.png")
    (place / "bad.png").write_bytes(images()["rgb.png"][:60])
    (place / "bad.zip").write_bytes((place / "photos.zip").read_bytes()[:500])
    (place / "notes.txt").write_text("words")
    (place / "tiny.yaml").write_text(TINY)
    (place / "bad.yaml").write_text("train: {stepps: 5}\n")
    (place / "bad.pt").write_bytes(b"no checkpoint")
    (place / "empty").mkdir()
    (place / "loop").symlink_to("loop")
    (place / "loop.png").symlink_to("loop.png")
    shutil.copytree(run, place / "run")
    for name in ("converted.pt", "converted.safetensors", "pipe/"):
        assert main(["convert", str(run), f"{place}/{name}", "-q"]) == 0
    shutil.copy(sorted(run.glob("samples/*.png"))[0], place / "made.png")
