"""Networks and schedules by arithmetic are those that are built, and nobody waits for torch."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ddpmctl import outline
from ddpmctl.build import build_net, build_schedule
from ddpmctl.core.schedule import SCHEDULES
from ddpmctl.core.unet import NORMS
from ddpmctl.runfile import flag_layer, read_run_file, resolve

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))
WIDE = {"model.base_channels": 8, "model.norm_groups": 4, "data.conditional": True}


def built(config: Any, shape: tuple[int, int, int], classes: int) -> tuple[dict[str, int], int]:
    """Parameters by block and FLOPs of a forward pass, of the real network."""
    with torch.device("meta"):
        net = build_net(config, shape[0], classes)
    blocks: Counter[str] = Counter()
    for name, parameter in net.named_parameters():
        parts = name.split(".")
        blocks[".".join(parts[:2]) if parts[0] in ("down", "middle", "up") else parts[0]] += parameter.numel()
    counter = FlopCounterMode(display=False)
    index = torch.zeros(1, dtype=torch.long, device="meta")
    with counter, torch.no_grad():
        net.eval()(torch.zeros(1, *shape, device="meta"), index, index if classes else None)
    return dict(blocks), counter.get_total_flops()


def assert_same(config: Any, shape: tuple[int, int, int], classes: int) -> None:
    blocks = outline.network(config, shape, classes)
    parameters, flops = built(config, shape, classes)
    assert {block.name: block.parameters for block in blocks} == parameters
    assert 2 * sum(block.multiply_adds for block in blocks) == flops


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_networks_of_the_examples(example: Path) -> None:
    config = resolve(read_run_file(example))
    assert_same(config, (3, 64, 64), 10 if config.data.conditional else 0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "settings",
    [
        {"model.channel_mults": [1], "model.attention_levels": []},
        {"model.channel_mults": [1, 3, 2], "model.num_res_blocks": [1, 2, 3], "model.attention_levels": [0, 2]},
        {"model.time_embedding": "none", "model.padding": 2, "model.channel_mults": [2, 2]},
        {"model.middle_attention": False, "model.head_channels": 8, "model.down_padding": "right_bottom"},
        {"model.time_embedding": 24, "model.patch": 2, "model.label_dropout": 0.1, "diffusion.learn_variance": True},
    ],
)
def test_networks_of_all_kinds(norm: str, settings: dict[str, Any]) -> None:
    config = resolve(flag_layer({**WIDE, **settings, "model.norm": norm}))
    for classes in (0, 3):
        assert_same(config, (1, 16, 32), classes)


@pytest.mark.parametrize("shift", [1, 4])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("timesteps", [2, 3, 20, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name: str, timesteps: int, zero: bool, shift: float) -> None:
    flags = {"diffusion.schedule": name, "diffusion.timesteps": timesteps, "diffusion.prediction": "v", "diffusion.shift": shift}
    config = resolve(flag_layer({**flags, "diffusion.zero_terminal_snr": zero}))
    schedule, found = build_schedule(config), outline.alpha_bar(config)
    assert torch.allclose(torch.tensor(found, dtype=torch.float64), schedule.alpha_bar, rtol=1e-9, atol=1e-15)
    decibels = torch.tensor([outline.snr_db(value) for value in found[1:]], dtype=torch.float64)
    assert torch.allclose(decibels, schedule.snr_db()[1:], rtol=1e-6, atol=1e-6)


def test_every_schedule_has_a_row() -> None:
    assert outline.BETAS.keys() == SCHEDULES.keys()


def test_inspecting_a_run_file_imports_nothing_heavy() -> None:
    program = (
        "import sys; from ddpmctl.cli import main; code = main(['inspect', sys.argv[1]]);"
        "print(code, *sorted({'torch', 'numpy', 'PIL'} & sys.modules.keys()), file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, str(EXAMPLES[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr.split() == ["0"] and "terminal SNR" in done.stdout
