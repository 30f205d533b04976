"""Several processes train what one does, and one that dies takes nothing along: real processes, on the CPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from ddpmctl.cli import main
from ddpmctl.data import tar
from ddpmctl.errors import Exit
from helpers import Means, write_images
from runs import COMMAND, assert_whole, rows, state_of, steps_saved, train_process, wait_for
from tars import write_shards

SETTINGS = """\
seed: 5
device: cpu
precision: fp32
data: {size: 16, hflip: true, conditional: true, holdout: 0.1}
diffusion: {timesteps: 20, t_sampling: importance, offset_noise: 0.1}
model: {base_channels: 8, channel_mults: [1, 2], num_res_blocks: 1, attention_levels: [1], dropout: 0.0, norm_groups: 4,
        label_dropout: 0.2}
train: {steps: 50, batch_size: 7, grad_accum: 2, lr: 2e-4, save_every: 1000, sample_every: 0, samples: 2, sample_steps: 2,
        log_every: 5, val_every: 20}
"""
"""A batch that neither 2 nor 4 divide, in parts, and a draw of every kind."""


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    (tmp_path / "settings.yaml").write_text(SETTINGS)
    return [str(write_images(tmp_path / "photos", count=20)), "-c", str(tmp_path / "settings.yaml")]


def assert_close(run: Path, other: Path) -> None:
    """The last checkpoints hold the same to 1e-5, and the metrics to their digits."""
    last = steps_saved(run)[-1]
    assert steps_saved(other)[-1] == last
    a, b = state_of(run, last), state_of(other, last)
    for part in ("net", "ema"):
        one, two = (state[part].get("net", state[part]) for state in (a, b))
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    for row, same in zip(rows(run), rows(other), strict=True):
        for key in ("step", "epoch", "skipped", "lr"):
            assert row[key] == same[key]
        assert float(row["loss"]) == pytest.approx(float(same["loss"]), abs=1e-4)


def ranks_of(launcher: subprocess.Popen[str]) -> dict[int, int]:
    """Rank -> process, of those that ``launcher`` has started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    found = {}
    for child in children:
        rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", Path(f"/proc/{child}/environ").read_bytes())
        if rank:
            found[int(rank[1])] = int(child)
    return found


@contextmanager
def torchrun(count: int, restarts: int, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """``torchrun ... -m ddpmctl``; ended with all that it started when the block ends."""
    words = ["--standalone", "--nproc-per-node", str(count), "--max-restarts", str(restarts), *map(str, arguments)]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        left = ranks_of(process).values() if process.poll() is None else ()
        for pid in (*left, *([process.pid] if process.poll() is None else ())):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def fail(error: Exception) -> NoReturn:
    raise error


linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are found by /proc")


@linux
def test_a_signal_to_any_process_stops_all_and_any_number_of_them_goes_on_as_one_would(base: list[str]) -> None:
    assert main(["train", *base, "-q", "--out", "one"]) == 0
    with train_process(*base, "--out", "two", "--devices", "cpu,cpu") as launcher:
        wait_for(lambda: Path("two/metrics.csv").exists() and len(rows(Path("two"))) > 2, launcher)
        os.kill(ranks_of(launcher)[1], signal.SIGTERM)
        printed = launcher.communicate(timeout=60)[0]
    assert launcher.returncode == 75, printed
    assert "by SIGTERM, saved" in printed and printed.count("stopped at") == 1
    [stopped] = steps_saved(Path("two"))
    assert 10 < stopped < 50
    shutil.copytree("two", "four")
    assert main(["train", *base, "-q", "--out", "two", "--resume"]) == 0
    assert_close(Path("one"), Path("two"))
    again = subprocess.run([*COMMAND, "train", "--resume", "four", "--devices", "cpu,cpu,cpu,cpu"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"resumed    from step {stopped}" in again.stdout and again.stdout.count("resumed") == 1
    assert_close(Path("one"), Path("four"))


@linux
def test_a_process_that_is_killed_ends_the_others_and_torchrun_goes_on_by_itself(base: list[str]) -> None:
    endless = [*base, "--out", "run", "--set", "train.save_every=3", "--device", "cpu"]
    with torchrun(2, 1, "-m", "ddpmctl", "train", *endless) as agent:
        wait_for(lambda: Path("run/checkpoints").exists() and steps_saved(Path("run")), agent)
        os.kill(ranks_of(agent)[1], signal.SIGKILL)
        printed = agent.communicate(timeout=120)[0]
    assert agent.returncode == 0, printed
    assert printed.count("error: another process of this job has ended") == 1, printed
    assert re.search(r"resumed +from step \d", printed) and "done: run" in printed, printed
    assert_whole(Path("run"))
    assert main(["train", *base, "-q", "--out", "whole", "--set", "train.save_every=3"]) == 0
    assert_close(Path("whole"), Path("run"))


@linux
def test_one_process_that_torchrun_starts_again_goes_on_with_its_run(base: list[str]) -> None:
    with torchrun(1, 1, "-m", "ddpmctl", "train", *base, "--out", "run", "--set", "train.save_every=3", "--device", "cpu") as agent:
        wait_for(lambda: Path("run/checkpoints").exists() and steps_saved(Path("run")), agent)
        os.kill(ranks_of(agent)[0], signal.SIGKILL)
        printed = agent.communicate(timeout=120)[0]
    assert agent.returncode == 0, printed
    assert re.search(r"resumed +from step \d", printed) and "done: run" in printed, printed
    assert_whole(Path("run"))


@linux
@pytest.mark.parametrize("flags", [[], ["--overwrite", "--set", "train.batch_size=1", "--set", "train.grad_accum=1"]])
def test_torchrun_starting_again_leaves_alone_what_its_job_has_not_begun(base: list[str], flags: list[str]) -> None:
    """An older run in the place of the new one: refused at first, or kept by what fails before it would be replaced."""
    assert main(["train", *base, "-q", "--out", "run", "--steps", "2"]) == 0
    before = {file: file.stat().st_mtime_ns for file in Path("run").rglob("*.pt")}
    with torchrun(2, 1, "-m", "ddpmctl", "train", *base, "--out", "run", "--device", "cpu", *flags) as agent:
        printed = agent.communicate(timeout=120)[0]
    assert agent.returncode != 0 and "resumed" not in printed, printed
    assert printed.count("run: exists" if not flags else "fewer images than the 2 processes") == 2, printed
    assert {file: file.stat().st_mtime_ns for file in Path("run").rglob("*.pt")} == before


@linux
@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_whoever_is_killed_the_rest_ends_with_one_line_and_the_run_goes_on(base: list[str], victim: int) -> None:
    with train_process(*base, "--out", "run", "--steps", "100000", "--set", "train.save_every=3", "--devices", "cpu,cpu,cpu") as launcher:
        wait_for(lambda: Path("run/checkpoints").exists() and steps_saved(Path("run")), launcher)
        processes = ranks_of(launcher)
        os.kill(processes[victim], signal.SIGKILL)
        printed = launcher.communicate(timeout=60)[0]
    assert launcher.returncode == 8, printed
    assert printed.count("error:") == 1 and "another process of this job has ended" in printed, printed
    assert f"process {victim} of 3 was ended by SIGKILL" in printed
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes.values())
    assert_whole(Path("run"))
    assert main(["train", "--resume", "run", "-q", "--steps", str(steps_saved(Path("run"))[-1] + 2)]) == 0


DRIVER = """\
import os, sys
from ddpmctl import training
from ddpmctl.cli import main

plain, tried = training.denoising_loss, []

def spoilt(denoiser, x0, *args, **options):
    step = STATE[0].step + 1
    last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
    if last and step == 4 and not tried:
        tried.append(step)
        raise MemoryError
    loss = plain(denoiser, x0, *args, **options)
    return loss * float("nan") if last and 8 <= step <= 10 and not STATE[0].rollbacks else loss

STATE, gradients = [None], training.add_gradients

def noted(state, *args):
    STATE[0] = state
    return gradients(state, *args)

training.denoising_loss, training.add_gradients = spoilt, noted
sys.exit(main(sys.argv[1:]))
"""


def test_what_goes_wrong_in_one_process_is_decided_alike_in_all(base: list[str]) -> None:
    """The last one runs out of memory once, and later its loss is no number, until the run goes back."""
    Path("driver.py").write_text(DRIVER)
    words = ["train", *base, "--steps", "14", "--set", "train.bad_steps=3", "--set", "train.save_every=5", "--set", "train.grad_accum=1"]
    one = subprocess.run([sys.executable, "driver.py", *words, "--out", "one"], capture_output=True, text=True)
    assert one.returncode == 0, one.stderr
    with torchrun(2, 0, "driver.py", *words, "--out", "two") as agent:
        printed = agent.communicate(timeout=120)[0]
    assert agent.returncode == 0, printed
    for text in (one.stderr, printed):
        assert text.count("out of memory") == 1 and text.count("back to step 5 with half the lr, 1 of 3 times") == 1, text
    assert state_of(Path("two"), 14)["rollbacks"] == 1
    assert_close(Path("one"), Path("two"))


def shards(bad: Container[int] = ()) -> list[str]:
    """54 images in blocks of 10, which end within a batch, and a few that are held out."""
    pytest.importorskip("webdataset")
    write_shards(Path("shards"), (20, 20, 20), label=lambda n: str(n % 2), bad=bad, size=(16, 16))
    return ["shards", "-c", "settings.yaml", "--steps", "12", "--set", "data.shuffle=10"]


BROKEN = """\
import os, sys
from pathlib import Path
from ddpmctl.cli import main
from ddpmctl.data import tar

plain = tar._content

def content(tar, info):
    if info.name == "000034.png" and os.environ["RANK"] == "1" and Path("broken").exists():
        Path("broken").unlink()
        raise OSError(5, "Input/output error")
    return plain(tar, info)

tar._content = content
sys.exit(main(sys.argv[1:]))
"""
"""An image that one process alone cannot read, and once."""


@linux
def test_what_only_one_process_cannot_read_costs_no_step(base: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("driver.py").write_text(BROKEN)
    words, gone = ["train", *shards()], f"{Path().absolute()}/shards/train-001.tar: Input/output error"
    with monkeypatch.context() as patch:
        plain = tar._content
        broken = {"000034.png": OSError(5, "Input/output error")}
        patch.setattr(tar, "_content", lambda tar, info: fail(broken[info.name]) if info.name in broken else plain(tar, info))
        assert main([*words, "-q", "--out", "one"]) == Exit.DATA
    [saved] = steps_saved(Path("one"))
    assert 0 < saved < 12 and main(["train", "--resume", "one", "-q"]) == 0
    Path("broken").touch()
    with torchrun(2, 1, "driver.py", *words, "--out", "two") as agent:
        printed = " ".join(agent.communicate(timeout=300)[0].split())
    assert agent.returncode == 0 and "done: two" in printed, printed
    assert printed.count("error: ") == 1 and re.search(f"error: process 1 of 2 on [^:]+: {gone}", printed), printed
    assert "(exitcode: 3) local_rank: 0" in printed and f"resumed from step {saved}" in printed, printed
    assert_close(Path("one"), Path("two"))


def test_bad_images_are_those_of_all_processes(base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Four in the first blocks, of each process some; with three more there are too many, though not of any one process."""
    words = shards(bad=(53, 56, 58, 59, 16, 17, 19))
    assert main(["train", *words, "-q", "--out", "one"]) == Exit.DATA
    told = "train-000.tar/000016.png: not an image that can be read; 7 of 40 images that were come to are unreadable"
    assert f"error: {told}" in " ".join(capsys.readouterr().err.split())
    with train_process(*words, "--out", "two", "--devices", "cpu,cpu") as launcher:
        printed = " ".join(launcher.communicate(timeout=300)[0].split())
    assert launcher.returncode == Exit.DATA and printed.count(f"error: {told}") == printed.count("error:") == 1, printed
    assert steps_saved(Path("one")) == steps_saved(Path("two")) == [4]
    listed = [(Path(name) / "bad-images.csv").read_text() for name in ("one", "two")]
    assert listed[0] == listed[1] and listed[0].count(".png") == 4


@pytest.mark.slow
@pytest.mark.parametrize("out", ["x.npz", "x.gif", "x/"])
def test_several_processes_make_the_same_images(trained: Path, out: str) -> None:
    for count in (1, 3):
        words = ["sample", trained, "-n", "7", "--batch-size", "2", "--sampler", "ddpm", "-q", "-o", f"{count}-{out}"]
        done = subprocess.run([*COMMAND, *map(str, words), "--devices", ",".join(["cpu"] * count)], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stdout + done.stderr, done
    files = [sorted(p for p in Path().rglob("*") if p.is_file() and str(p).startswith(f"{count}-")) for count in (1, 3)]
    assert len(files[0]) == len(files[1]) > 0
    for one, three in zip(*files, strict=True):
        assert one.read_bytes() == three.read_bytes()


SHARING = """\
import os, sys
from pathlib import Path
from ddpmctl import turns
from ddpmctl.cli import main

plain = turns.one_each

def noted(ranks, work, *pieces):
    def counted(piece):
        with Path(f"work-{os.environ.get('RANK', '0')}").open("a") as file:
            file.write(f"{work.__name__} {len(piece)}\\n")
        return work(piece)
    return plain(ranks, counted, *pieces)

turns.one_each = noted
if "train" in sys.argv:
    from ddpmctl.evaluation import scoring
    sys.path.insert(0, "TESTS")
    from helpers import Means
    scoring.load_features = lambda name, device: Means()
sys.exit(main(sys.argv[1:]))
""".replace("TESTS", str(Path(__file__).parents[1]))


@contextmanager
def alongside(world: int, *words: str) -> Iterator[list[subprocess.Popen[str]]]:
    """``driver.py`` in ``world`` processes, which find each other as those that srun starts do; killed when the block ends."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen([sys.executable, "driver.py", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                         env={**os.environ, **{key: str(value) for key, value in {**shared, "RANK": i, "LOCAL_RANK": i}.items()}})
        for i in range(world)
    ]  # fmt: skip
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


def told_by(world: int, *words: str) -> str:
    """What ``driver.py`` prints in ``world`` processes that end well."""
    with alongside(world, *words) as processes:
        printed = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, printed
    assert not any(printed[1:]), printed
    return printed[0]


WAITING = """\
import os, sys
from concurrent.futures import CancelledError
from pathlib import Path
from ddpmctl.cli import main
from ddpmctl.data.addresses import NEVER
from ddpmctl.data.stream import Stream

plain = Stream.samples

def samples(self, seed, epoch, start=0, stop=NEVER):
    if os.environ["RANK"] == "1":
        Path("waiting").touch()
        stop.wait()
        raise CancelledError
    yield from plain(self, seed, epoch, start, stop)

Stream.samples = samples
sys.exit(main(sys.argv[1:]))
"""
"""A server that is silent to one process, and for ever."""


@pytest.mark.parametrize("told", [pytest.param((0, 1), marks=pytest.mark.slow), (1,)])
def test_a_signal_ends_the_trial_of_the_first_step_though_a_server_is_silent_to_one(base: list[str], told: tuple[int, ...]) -> None:
    Path("driver.py").write_text(WAITING)
    with alongside(2, "train", *shards(), "--out", "r") as processes:
        wait_for(Path("waiting").exists, processes[1])
        for rank in told:
            processes[rank].send_signal(signal.SIGTERM)
        printed = processes[0].communicate(timeout=60)[0]
        processes[1].communicate(timeout=60)
    assert processes[0].returncode == (Exit.INTERRUPTED if told == (1,) else 128 + signal.SIGTERM), printed
    assert "error: interrupted" in printed and "Traceback" not in printed and not Path("r/run.yaml").exists(), printed


def shares(world: int) -> list[list[str]]:
    """What each process has worked at, a line a piece; forgotten then."""
    files = [Path(f"work-{rank}") for rank in range(world)]
    found = [file.read_text().splitlines() for file in files]
    for file in files:
        file.unlink()
    return found


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_several_processes_evaluate_as_one_does(trained: Path, world: int, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch_fidelity")
    data = trained.parent / "photos"
    words = ["evaluate", str(trained), str(data), "-n", "12", "--batch-size", "3", "--steps", "3", "--json", "--no-cache"]
    capsys.readouterr()
    assert main([*words, "--device", "cpu"]) == 0
    one = json.loads(capsys.readouterr().out)
    Path("driver.py").write_text(SHARING)
    assert json.loads(told_by(world, *words, "--device", "cpu")) == one
    # Twelve samples, as many images, 256 draws of the loss, and the bits of the images.
    pieces = [4 * ["extract 3"], 4 * ["extract 3"], [*85 * ["losses 3"], "losses 1"], 4 * ["bits 3"]]
    assert shares(world) == [[line for kind in pieces for line in kind[rank::world]] for rank in range(world)]


@pytest.mark.slow
def test_several_processes_compare_two_sets_as_one_does(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch_fidelity")
    words = ["evaluate", str(photos), str(photos), "-n", "8", "--batch-size", "3", "--json"]
    found = []
    for devices in (["--device", "cpu"], ["--devices", "cpu,cpu,cpu"], ["--devices", "cpu,cpu"]):  # the last finds the cache
        done = subprocess.run([*COMMAND, *words, *devices], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_kid_and_the_held_out_loss_are_measured_by_all_processes(base: list[str], world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a learning rate at which nothing moves, or the networks would differ by rounding, and what is measured with them."""
    pytest.importorskip("torch_fidelity")
    monkeypatch.setattr("ddpmctl.evaluation.scoring.load_features", lambda name, device: Means())
    flags = ["--steps", "4", "--lr", "1e-30", "--evaluate-every", "2", "--set", "train.evaluate_samples=20", "--set", "train.samples=5"]
    assert main(["train", *base, "-q", "--out", "one", *flags]) == 0
    Path("driver.py").write_text(SHARING)
    told_by(world, "train", *base, "--out", "several", *flags)
    columns = ("step", "kid", "kid_spread", "val_loss", "val_q1", "val_q2", "val_q3", "val_q4")
    found = [[[row[name] for name in columns] for row in rows(Path(run)) if row["kid"]] for run in ("one", "several")]
    assert found[0] == found[1] and [step for step, *_ in found[0]] == ["2", "4"] and all(found[0][1])
    # Twice four batches of five samples, and what is less than a batch of features: that of the images once, of samples twice.
    lines = shares(world)
    assert [sum("_samples 5" in line for line in each) for each in lines] == {2: [4, 4], 3: [4, 2, 2]}[world]
    assert [sum("_features 20" in line for line in each) for each in lines] == [3] + [0] * (world - 1)
    assert [sum("losses" in line for line in each) for each in lines] == [len(range(rank, 86, world)) for rank in range(world)]


@linux
@pytest.mark.slow
def test_a_stop_while_kid_is_measured_stops_all_and_is_saved(base: list[str]) -> None:
    pytest.importorskip("torch_fidelity")
    measuring = ["--evaluate-every", "1", "--set", "train.evaluate_samples=20", "--steps", "100000"]
    with train_process(*base, "--out", "run", *measuring, "--devices", "cpu,cpu") as launcher:
        wait_for(lambda: Path("run/metrics.csv").exists() and len(rows(Path("run"))) > 1, launcher)
        os.kill(ranks_of(launcher)[0], signal.SIGTERM)  # nearly all of the time goes into KID
        printed = launcher.communicate(timeout=60)[0]
    assert launcher.returncode == 75, printed
    assert "by SIGTERM, saved" in printed and "error" not in printed
    [stopped] = steps_saved(Path("run"))
    assert main(["train", "--resume", "run", "-q", "--steps", str(stopped + 1)]) == 0
    assert [int(row["step"]) for row in rows(Path("run")) if row["kid"]] == list(range(1, stopped + 2))
