"""Runs on tar shards, by the real command: as one without a stop, whatever stops them, and in bounded memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpmctl import checkpoint, launch
from ddpmctl.cli import main
from ddpmctl.errors import Exit
from runs import assert_same, assert_same_run, rows, state_of, steps_saved, train_process, wait_for
from servers import Mute, Server, served
from tars import BAD, png, write_shards

SETTINGS = """\
seed: 11
precision: fp32
data: {size: 16, hflip: true, conditional: true, holdout: 0.1, workers: 2, shuffle: 7}
diffusion: {timesteps: 20}
model: {base_channels: 8, channel_mults: [1, 2], num_res_blocks: 1, attention_levels: [1], dropout: 0.2, norm_groups: 4}
train: {steps: 24, batch_size: 6, lr: 1e-3, save_every: 4, sample_every: 9, samples: 4, sample_steps: 3, log_every: 3, val_every: 7}
"""


COMMAND = ["shards/train-{000..004}.tar", "-c", "settings.yaml", "-q"]


def lay_out(folder: Path) -> None:
    """60 images in 5 shards, two of them bad, and a run file."""
    (folder / "settings.yaml").write_text(SETTINGS)
    write_shards(folder / "shards", (20, 5, 15, 10, 10), label=lambda n: str(n % 3), bad=(8, 30), size=(16, 16))


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    """The command but for --out, and what it needs in the present folder."""
    lay_out(tmp_path)
    return COMMAND


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one go; tests only read it."""
    place = tmp_path_factory.mktemp("undisturbed")
    lay_out(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(["train", *COMMAND, "--out", "run"]) == 0
    return place / "run"


def test_a_run_in_parts_is_the_run_in_one_go(base: list[str], undisturbed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert main(["train", *base, "--out", "parts", "--steps", "5"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for steps in ("6", "13", "24"):  # within a block, over the end of an epoch
        assert main(["train", "--resume", "../parts", "--steps", steps, "-q"]) == 0
    monkeypatch.chdir(tmp_path)
    assert_same(state_of(Path("parts"), 24)["net"], state_of(undisturbed, 24)["net"])
    saved = state_of(Path("parts"), 24)
    assert saved["config"]["data"]["path"] == f"shards:{tmp_path}/shards/train-{{000..004}}.tar"
    assert saved["class_names"] == ["0", "1", "2"] and saved["data"]["images"] == 60
    assert rows(undisturbed)[-1]["epoch"] == str(round(24 * 6 / 54, 4)) and float(rows(undisturbed)[-1]["val_loss"]) > 0
    listed = (undisturbed / "bad-images.csv").read_text().splitlines()
    assert sorted(listed[1:]) == [f"train-000.tar/000008.png,{BAD}", f"train-002.tar/000030.png,{BAD}"]
    assert sorted((Path("parts") / "bad-images.csv").read_text().splitlines()) == sorted(listed)


def test_a_run_that_is_killed_is_the_undisturbed_one(base: list[str], undisturbed: Path) -> None:
    for goal in (4, 16):
        resume = ["--resume"] if goal > 4 else []
        with train_process(*base, "--out", "killed", *resume) as process:
            wait_for(lambda goal=goal: steps_saved(Path("killed"))[-1:] >= [goal], process)
            process.kill()
            assert process.wait() == -9
    assert main(["train", *base, "--out", "killed", "--resume"]) == 0
    assert_same_run(Path("killed"), undisturbed)


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_ends_the_run_though_a_block_is_being_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "settings.yaml").write_text(SETTINGS.replace("shuffle: 7", "shuffle: 2000").replace("conditional: true, ", ""))
    write_shards(tmp_path / "shards", (6_000,), size=(16, 16))
    with train_process("shards", "-c", "settings.yaml", "--steps", "100k", "--out", "r", "--set", "data.workers=1") as process:
        wait_for(lambda: steps_saved(Path("r")), process)
        process.send_signal(signal.Signals[name])
        printed = process.communicate(timeout=60)[0]
    assert process.returncode == Exit.STOPPED and "Traceback" not in printed, printed
    assert steps_saved(Path("r"))[-1] > 0


def silenced(server: Server, how: str, process: subprocess.Popen[str]) -> int:
    """The last step saved once ``server`` has fallen silent, and all is used that has been read before."""
    server.silent = how
    wait_for(server.met.is_set, process)
    last = -1
    while last != (last := max(steps_saved(Path("r")))):
        time.sleep(1)
    return last


@pytest.mark.parametrize(
    ("name", "how"),
    [("SIGTERM", "head"), pytest.param("SIGUSR1", "body", marks=pytest.mark.slow), pytest.param("SIGINT", "body", marks=pytest.mark.slow)],
)
def test_a_signal_ends_the_run_though_a_server_is_silent(base: list[str], name: str, how: str) -> None:
    """Until the server had been silent four times for a minute, it would not."""
    with served(Path("shards"), Mute) as (address, server):
        place = f"{address}/train-{{000..004}}.tar"
        with train_process(place, *base[1:], "--steps", "100k", "--out", "r") as process:
            wait_for(lambda: steps_saved(Path("r")), process)
            last = silenced(server, how, process)
            process.send_signal(signal.Signals[name])
            printed = process.communicate(timeout=120)[0]
        assert process.returncode == Exit.STOPPED and "Traceback" not in printed, printed
        saved = steps_saved(Path("r"))[-1]
        assert saved >= last
        server.silent = ""
        assert main(["train", "--resume", "r", "--steps", f"{saved + 1}", "-q"]) == 0


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_ends_the_survey_of_a_silent_server(base: list[str], name: str) -> None:
    with served(Path("shards"), Mute) as (address, server):
        server.silent = "head"
        with train_process(f"{address}/train-{{000..004}}.tar", *base[1:], "--out", "r") as process:
            wait_for(server.met.is_set, process)
            process.send_signal(signal.Signals[name])
            printed = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.Signals[name] and "interrupted" in printed and "Traceback" not in printed, printed


def test_a_shard_that_changes_behind_its_address_costs_no_step(base: list[str], undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard, begin = Path("shards/train-002.tar"), launch.begin
    before = shard.stat().st_mtime - 100
    os.utime(shard, (before, before))
    with served(Path("shards")) as (address, _):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "begin", lambda *args: (begin(*args), shard.touch()))
            assert main(["train", f"{address}/train-{{000..004}}.tar", *base[1:], "--out", "r"]) == Exit.DATA
        assert "train-002.tar: changed since the run looked at it: another Last-Modified" in " ".join(capsys.readouterr().err.split())
        assert 0 < steps_saved(Path("r"))[-1] < 24
        os.utime(shard, (before, before))
        assert main(["train", "--resume", "r", "-q"]) == 0
    assert_same(state_of(Path("r"), 24)["net"], state_of(undisturbed, 24)["net"])


def test_a_shard_that_goes_while_the_run_trains_costs_no_step(base: list[str], undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard, begin = Path("shards/train-002.tar"), launch.begin
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "begin", lambda *args: (begin(*args), shard.rename("away.tar")))
        assert main(["train", *base, "--out", "r"]) == Exit.DATA
    assert "train-002.tar: changed, or gone" in " ".join(capsys.readouterr().err.split())
    assert 0 < steps_saved(Path("r"))[-1] < 24
    assert main(["train", "--resume", "r", "-q"]) == Exit.DATA and "no such shard" in " ".join(capsys.readouterr().err.split())
    Path("away.tar").rename(shard)
    assert main(["train", "--resume", "r", "-q"]) == 0
    assert_same(state_of(Path("r"), 24)["net"], state_of(undisturbed, 24)["net"])


def test_other_shards_are_refused_and_moved_ones_are_found_by_name(base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *base, "--out", "r", "--steps", "2"]) == 0
    Path("shards").rename("moved")
    assert main(["train", "--resume", "r", "--steps", "3", "-q"]) == Exit.DATA
    assert "no such shard, nor 4 more of 5" in " ".join(capsys.readouterr().err.split())
    assert main(["train", "moved", "--resume", "--out", "r", "--steps", "3", "-q"]) == 0
    write_shards(Path("moved"), (20, 5, 15, 10, 11), label=lambda n: str(n % 3), size=(16, 16))
    assert main(["train", "--resume", "r", "--steps", "4", "-q"]) == Exit.CONFIG
    assert "not the images that this run was trained on" in " ".join(capsys.readouterr().err.split())
    assert main(["train", "--resume", "r", "--steps", "4", "-q", "--set", "data.shuffle=9"]) == Exit.CONFIG
    assert "data.shuffle" in capsys.readouterr().err


def test_what_is_told_before_training(base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *base[:-1], "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "60 images in 5 shards, 30 that were looked at of 16x16" in shown and "in 3 classes" in shown
    assert main(["train", "shards", "--dry-run", "-c", "settings.yaml", "-q", "--set", "data.on_bad=error"]) == Exit.DATA
    assert main(["train", "pipe:touch made", "-q"]) == Exit.CONFIG and not Path("made").exists()
    Path("evil.yaml").write_text("data: {path: 'shards:pipe:touch made'}\n")
    assert main(["train", "-c", "evil.yaml", "-q"]) == Exit.CONFIG and not Path("made").exists()


def test_inspect_and_cache_know_shards(base: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ddpmctl.data.shards.TICK_NS", 0)
    monkeypatch.setenv("DDPMCTL_CACHE", str(tmp_path / "cache"))
    assert main(["inspect", "shards", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["images"]["usable"] == 60 and facts["images"]["shards"] == 5 and facts["images"]["looked_at"] == 30
    assert facts["classes"] == {"0": 20, "1": 20, "2": 20} and facts["sizes"] == {"16x16": 30}
    assert facts["refused"] == {"train-000.tar/000008.png": BAD, "train-002.tar/000030.png": BAD}
    assert main(["cache"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"shards:{tmp_path}/shards 60 index" in shown
    assert main(["cache", "--clear"]) == 0 and not list((tmp_path / "cache").iterdir())


def test_evaluate_compares_with_some_of_them(base: list[str], undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def facts(*words: str) -> dict:
        capsys.readouterr()
        assert main(["evaluate", *words, "-n", "20", "--steps", "2", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    found = facts(str(undisturbed), "shards")
    assert found["data"]["images"] == 60 and found["data"]["used"] == 20 and found["data"]["trained_on"]
    assert found["loss"]["of"] == "images that training held out" and found["loss"]["images"] == 6
    assert found["loss"]["mean"] == pytest.approx(float(rows(undisturbed)[-1]["val_loss"]), rel=1e-4)
    capsys.readouterr()
    assert main(["evaluate", "shards", "shards/*.tar", "-n", "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["distances"]["frechet"] == pytest.approx(0, abs=1e-3)
    assert main(["evaluate", str(undisturbed), "shards", "-n", "20", "--sheet", "x.png"]) == Exit.CONFIG
    assert "--sheet: shards: shards, of which not all images are in memory" in " ".join(capsys.readouterr().err.split())


def test_kid_in_training_is_of_held_out_images(base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--set", "train.evaluate_every=12", "--set", "train.evaluate_samples=20"]
    assert main(["train", *base, "--out", "r", *more]) == 0
    assert checkpoint.load(Path("r/checkpoints/best.pt"))["kid"] == pytest.approx(
        min(float(row["kid"]) for row in rows(Path("r")) if row["kid"]), abs=1e-5
    )
    assert main(["train", *base, "--out", "s", *more, "--set", "data.holdout=0"]) == Exit.CONFIG
    assert "train.evaluate_every" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_what_one_does(base: list[str]) -> None:
    import torch

    more = [*base, "--steps", "8", "--set", "model.dropout=0", "--set", "train.sample_every=0"]
    assert main(["train", *more, "--out", "one", "--device", "cpu"]) == 0
    with train_process(*more, "--out", "two", "--devices", "cpu,cpu") as process:
        printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    for name, value in state_of(Path("one"), 8)["net"].items():
        torch.testing.assert_close(state_of(Path("two"), 8)["net"][name], value, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["head", "once"])
def test_a_signal_ends_several_processes_though_a_server_is_silent_to_all_or_one(base: list[str], how: str) -> None:
    with served(Path("shards"), Mute) as (address, server):
        command = [f"{address}/train-{{000..004}}.tar", *base[1:-1], "--steps", "100k", "--out", "r", "--devices", "cpu,cpu"]
        with train_process(*command) as process:
            wait_for(lambda: steps_saved(Path("r")), process)
            last = silenced(server, how, process)
            process.send_signal(signal.SIGTERM)
            printed = process.communicate(timeout=120)[0]
    assert process.returncode == Exit.STOPPED and "by SIGTERM, saved" in printed and "error" not in printed, printed
    assert steps_saved(Path("r"))[-1] >= last


MEASURED = """
import re, sys
from contextlib import closing
from pathlib import Path
from ddpmctl.config import DataConfig
from ddpmctl.data.dataset import load_images
from ddpmctl.data.streamed import StreamedBatches

data = load_images(DataConfig(size=32, shuffle=int(sys.argv[2]), holdout=0.01), Path(sys.argv[1]))
with closing(StreamedBatches(data.stream, 500, seed=0)) as batches:
    for step in range(1, batches.count // 500 + 3):
        assert batches(step).x0.shape == (500, 3, 32, 32)
    # Not ru_maxrss, which begins with that of the process that has started this one.
    peak = re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]
    print(batches.epoch_of(step), int(peak) / 1024)
"""


def members(count: int) -> Iterator[tuple[bytes, bytes]]:
    """Header and content, padded, of so many images."""
    pictures = [png(number, (32, 32)) for number in range(100)]
    for number in range(count):
        raw = pictures[number % 100]
        info = tarfile.TarInfo(f"{number:08d}.png")
        info.size = len(raw)
        yield info.tobuf(), raw + b"\0" * (-len(raw) % 512)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says how much memory a process took at most")
def test_a_hundred_thousand_images_take_the_memory_of_a_few(tmp_path: Path) -> None:
    """Decoded they are 293 MiB; an epoch goes by with 3 MiB in each of two blocks."""
    peaks, epochs = {}, {}
    for count, shards in ((2_000, 2), (100_000, 20)):
        folder = tmp_path / f"{count}"
        folder.mkdir()
        images = members(count)
        for shard in range(shards):
            with (folder / f"{shard:03d}.tar").open("wb") as file:
                for _ in range(count // shards):
                    file.write(b"".join(next(images)))
                file.write(b"\0" * 1024)
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-c", MEASURED, str(folder), "1000"], capture_output=True, text=True, check=True)
        epochs[count], peaks[count] = map(float, done.stdout.split())
        print(f"\n{count:,} images: {peaks[count]:.0f} MiB at most, {time.monotonic() - began:.0f} s")
    assert epochs[100_000] > 1 and peaks[100_000] - peaks[2_000] < 40
