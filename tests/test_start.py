"""Samples that start from a picture: how much of it stays, and that a picture can be made again from what it says."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpmctl.cli import main
from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.noise import ImageNoise
from ddpmctl.core.samplers import SAMPLERS
from ddpmctl.core.schedule import NoiseSchedule
from ddpmctl.editing import Start
from ddpmctl.errors import Exit
from ddpmctl.plans import USUAL, Plan
from ddpmctl.sampling import generate, levels

SCHEDULE = NoiseSchedule.named("cosine", 1000)
CPU = torch.device("cpu")


def picture() -> torch.Tensor:
    return torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("strength", "steps", "taken"), [(0.6, 20, 12), (1.0, 20, 20), (0.01, 20, 1), (0.5, 1, 1), (0.3, 1000, 300)])
def test_the_last_steps_of_the_whole_way_are_taken(strength, steps, taken):
    way = Plan("ddim", steps, "linear")
    whole, part = levels(SCHEDULE, way), levels(SCHEDULE, way, Start(picture(), strength))
    assert len(whole) == steps + 1 and len(part) == taken + 1 and whole[-len(part) :] == part


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_network_that_knows_the_picture_brings_it_back_and_begins_with_it_noised(sampler):
    seen = []

    def net(x_t, t_index, label):
        seen.append((x_t.clone(), int(t_index[0]) + 1))
        return picture().expand_as(x_t)

    start = Start(picture(), 0.4)
    way = USUAL[sampler]._replace(steps=10)
    *_, last = generate(Denoiser(net, SCHEDULE, "x0"), (3, 4, 4), 5, seed=9, way=way, device=CPU, course=start, batch_size=5)
    assert torch.allclose(last.state.x_t, picture().expand(5, 3, 4, 4), atol=1e-5)
    x_t, t = seen[0]
    assert t == levels(SCHEDULE, way, start)[0] < 1000
    eps = ImageNoise(9, range(5), (3, 4, 4))()
    abar = SCHEDULE.alpha_bar[t]
    assert torch.allclose(x_t, (abar.sqrt() * picture() + (1 - abar).sqrt() * eps).float(), atol=1e-6)
    assert len({float(image.sum()) for image in x_t}) == 5, "every image has its own noise"


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_the_command_starts_from_a_picture_and_says_how_to_do_it_again(trained, photos, capsys):
    image = str(sorted(photos.rglob("*.png"))[0])
    Path("mine.png").write_bytes(Path(image).read_bytes())
    base = ["sample", str(trained), "-n", "4", "--seed", "3", "--steps", "10", "--init", "mine.png"]
    for strength in ("0.1", "0.9"):
        assert main([*base, "--strength", strength, "-o", f"{strength}.png", "--columns", "1"]) == 0
    shown = capsys.readouterr().out
    assert "the last 1 of 10 steps (1 evaluations)" in shown and "from mine.png at strength 0.9" in shown
    original = np.tile(pixels("mine.png"), (1, 1, 1))
    near, far = (np.abs(pixels(f"{name}.png")[2:18, 2:18] - original).mean() for name in ("0.1", "0.9"))
    assert near < far / 2
    assert main(["inspect", "0.9.png"]) == 0
    command = next(line for line in capsys.readouterr().out.splitlines() if "ddpmctl sample" in line)
    words = shlex.split(command[command.index("ddpmctl sample") :])
    assert "--init" in words and "--strength" in words
    words[words.index("-o") + 1] = "again.png"
    assert main(words[1:]) == 0
    assert (pixels("again.png") == pixels("0.9.png")).all()


@pytest.mark.parametrize("output", ["x.gif", "x.npz", "x/"])
def test_every_kind_of_output_starts_from_a_picture(trained, photos, output):
    image = str(sorted(photos.rglob("*.png"))[0])
    assert main(["sample", str(trained), "-n", "2", "--steps", "10", "--init", image, "--strength", "0.5", "-o", output, "-q"]) == 0
    if output == "x.gif":
        with Image.open("x.gif") as animation:
            assert animation.n_frames == 6, "from the noised picture over five steps"


@pytest.mark.parametrize(("flags", "code", "said"), [
    (["--strength", "0.5"], Exit.CONFIG, "--strength 0.5: there is no picture"),
    (["--init", "nowhere.png"], Exit.DATA, "nowhere.png: cannot be read"),
    (["--init", "PHOTO", "--strength", "0"], Exit.CONFIG, "--strength 0.0: must be above 0"),
    (["--init", "PHOTO", "--strength", "1.5"], Exit.CONFIG, "--strength 1.5: must be above 0"),
    (["--init", "PHOTO", "--strength", "nan"], Exit.CONFIG, "--strength nan"),
    (["--init", "."], Exit.DATA, ".: not a file"),
])  # fmt: skip
def test_what_cannot_be_started_from_is_refused(trained, photos, capsys, flags, code, said):
    photo = str(sorted(photos.rglob("*.png"))[0])
    assert main(["sample", str(trained), "-o", "x.png", *[photo if flag == "PHOTO" else flag for flag in flags]]) == code
    assert said in capsys.readouterr().err and not Path("x.png").exists()
