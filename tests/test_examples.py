"""The run files and the images of ``examples/``."""

from __future__ import annotations

import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch

from ddpmctl.build import build_net
from ddpmctl.cli import main
from ddpmctl.config import DataConfig
from ddpmctl.data.dataset import load_images
from ddpmctl.errors import Exit
from ddpmctl.runfile import check_size, read_run_file, resolve

EXAMPLES = Path(__file__).parents[1] / "examples"
RUN_FILES = sorted(EXAMPLES.glob("*.yaml"))


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_a_run_file_is_valid_and_its_network_can_be_built(path):
    config = resolve(read_run_file(path))
    assert config.data.size != "auto"
    check_size(config, config.data.size)
    with torch.device("meta"):
        net = build_net(config, 3, 0)
        x = torch.zeros(1, 3, *config.data.size)
        assert net(x, torch.zeros(1, dtype=torch.long)).shape == x.shape


def test_the_run_files_that_users_expect_are_there():
    found = {path.stem: resolve(read_run_file(path)) for path in RUN_FILES}
    assert {"quickstart", "cifar10", "flowers", "conditional", "pinned"} <= set(found)
    assert found["conditional"].data.conditional
    pinned = found["pinned"]
    assert (pinned.device, pinned.precision, pinned.diffusion.loss) == ("cuda:1", "fp16", "l1")
    assert found["flowers"].data.size == (64, 64) and found["flowers"].model.channel_mults == [1, 2, 4, 8]


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there is a second GPU")
def test_a_pinned_device_that_is_missing_is_a_clear_error(photos, capsys):
    assert main(["train", str(photos), "-c", str(EXAMPLES / "pinned.yaml")]) == Exit.DEVICE
    assert "cuda:1" in capsys.readouterr().err


def test_the_images_are_two_hundred_a_class():
    with zipfile.ZipFile(EXAMPLES / "fashion.zip") as archive:
        classes = Counter(name.split("/")[0] for name in archive.namelist())
    assert len(classes) == 10 and set(classes.values()) == {200}
    data = load_images(DataConfig(size=28, conditional=True), EXAMPLES / "fashion.zip")
    assert data.images.shape == (2000, 1, 28, 28) and len(data.class_names) == 10
    assert (EXAMPLES / "fashion-LICENSE.txt").read_text().count("Zalando") >= 1
