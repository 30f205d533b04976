"""The run files and the images of ``examples/``."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
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
from ddpmctl.rules import check_size
from ddpmctl.runfile import read_run_file, resolve

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


def test_what_the_quickstart_says_of_images_in_one_folder_is_enough(photos, capsys):
    for number, file in enumerate(sorted(photos.rglob("*.png"))):
        file.rename(photos / f"{number}.png")
    for folder in (photos / "cats", photos / "dogs"):
        folder.rmdir()
    quick = ["--dry-run", "--batch-size", "2", "--set", "model.base_channels=8", "--set", "train.samples=1", "--set", "train.sample_steps=1"]
    command = ["train", str(photos), "-c", str(EXAMPLES / "quickstart.yaml"), *quick]
    assert main(command) == Exit.DATA
    settings = re.findall(r"\S+=\S+", capsys.readouterr().err)
    assert settings == ["data.conditional=false", "model.label_dropout=0"]
    assert all(f"--set {setting}" in (EXAMPLES / "quickstart.yaml").read_text() for setting in settings)
    assert main([*command, *(word for setting in settings for word in ("--set", setting))]) == 0


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


@pytest.mark.slow
def test_the_batch_script_trains_on_two_machines_and_goes_on(photos, tiny, tmp_path):
    """With a scheduler that is none: its machines are processes of this one."""
    fakes = {"scontrol": "echo 127.0.0.1", "srun": 'for i in $(seq "$SLURM_NNODES"); do "$@" & all+=($!); done; for p in "${all[@]}"; do wait "$p" || exit 1; done'}
    for name, text in fakes.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}", "DATA": str(photos), "RUN": "run",
           "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": "7", "PORT": str(port)}  # fmt: skip
    for steps in ("4", "6"):
        words = [str(EXAMPLES / "slurm.sh"), "-c", str(tiny), "--device", "cpu", "--steps", steps]
        done = subprocess.run(["bash", *words], env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "2 processes" in done.stdout and f"done: run, checkpoint step-{int(steps):08d}.pt" in done.stdout
    assert "resumed    from step 4" in done.stdout
