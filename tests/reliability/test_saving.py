"""Saving that fails, folders that vanish, two processes at once, files that rot."""

from __future__ import annotations

import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpmctl import checkpoint
from ddpmctl.cli import main
from ddpmctl.errors import CheckpointError, Exit, OutputError
from helpers import spoilt
from runs import COMMAND, assert_same, assert_whole, rows, state_of, steps_saved, train_process, wait_for

LONG = ["--steps", "1000000", "--set", "train.sample_every=0", "--set", "train.save_every=5", "--set", "train.log_every=1"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB, where the machine lets us mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    if not shutil.which("mount") or subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", place], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting is not allowed here; the limit of file sizes is tested all the same")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path) -> Path:
    """Leave no byte free."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            while True:
                try:
                    file.write(b"x" * size)
                except OSError:
                    break
    return filler


def contiguous(run: Path) -> bool:
    """Every step has its row, once and in order."""
    steps = [int(row["step"]) for row in rows(run)]
    return steps == list(range(1, len(steps) + 1))


def test_a_full_disk_is_outlived(small_disk: Path, tmp_path: Path, photos: Path, tiny: Path) -> None:
    run = small_disk / "run"
    with (tmp_path / "printed").open("w") as out, subprocess.Popen(
        [*COMMAND, "train", photos, "-c", tiny, "--out", run, *LONG], stdout=out, stderr=out
    ) as process:  # fmt: skip
        try:
            wait_for(lambda: steps_saved(run), process)
            filler = fill(small_disk)
            wait_for(lambda: "step-" in (tmp_path / "printed").read_text(), process)
            assert_whole(run)
            assert steps_saved(run), "the last good checkpoint is kept"
            last = steps_saved(run)[-1]
            wait_for(lambda: (tmp_path / "printed").read_text().count("the next try is in 5 steps") >= 3, process)
            filler.unlink()
            wait_for(lambda: steps_saved(run)[-1] > last, process)
            fill(small_disk)
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=60)
        finally:
            process.kill()
    printed = (tmp_path / "printed").read_text()
    assert code in (Exit.OUTPUT, Exit.STOPPED), printed
    assert "No space left on device" in printed and "Traceback" not in printed
    assert printed.count("metrics.csv: cannot be written") <= 2, "a fault that lasts is told once"
    assert_whole(run)
    (small_disk / "filler").unlink()
    assert main(["train", "--resume", str(run), "--steps", str(steps_saved(run)[-1] + 3), "-q"]) == 0
    assert contiguous(run)


def test_a_folder_that_becomes_read_only_is_outlived(small_disk: Path, photos: Path, tiny: Path) -> None:
    run = small_disk / "run"
    with train_process(photos, "-c", tiny, "--out", run, *LONG) as process:
        wait_for(lambda: steps_saved(run), process)
        # A read-only file system in place of the folder: file rights would not stop a test that runs as root.
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", run / "checkpoints"], check=True)
        try:
            after = len(rows(run)) + 30
            wait_for(lambda: len(rows(run)) > after, process)
        finally:
            subprocess.run(["umount", "-l", run / "checkpoints"], check=True)
        wait_for(lambda: steps_saved(run)[-1] > after, process)
        process.send_signal(signal.SIGTERM)
        printed = process.communicate(timeout=60)[0]
    assert process.returncode == Exit.STOPPED, printed
    assert "Read-only file system: going on, the next try is in 5 steps" in printed
    assert contiguous(run)
    assert_whole(run)


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(tmp_path: Path, photos: Path, tiny: Path) -> None:
    """By a limit of file sizes, which every machine has: no checkpoint fits, but rows of metrics do."""
    run = tmp_path / "run"
    arguments = [photos, "-c", tiny, "--out", run, "--set", "train.save_every=2", "--set", "data.cache=false"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    with train_process(*arguments, preexec_fn=limit) as process:
        printed = process.communicate(timeout=120)[0]
    assert process.returncode == Exit.OUTPUT, printed
    assert printed.count("going on, the next try is in 2 steps") == 2
    assert "step-00000006.pt: cannot be written: File too large" in printed and "Traceback" not in printed
    assert [row["step"] for row in rows(run)] == ["2", "4", "6"]
    assert list((run / "checkpoints").iterdir()) == []


def test_a_folder_that_vanishes_is_made_again(tmp_path: Path, photos: Path, tiny: Path) -> None:
    run = tmp_path / "runs" / "run"
    with train_process(photos, "-c", tiny, "--out", run, *LONG) as process:
        wait_for(lambda: steps_saved(run), process)
        gone = tmp_path / "gone"
        (tmp_path / "runs").rename(gone)
        last = steps_saved(gone / "run")[-1]
        wait_for(lambda: steps_saved(run) and steps_saved(run)[-1] > last, process)
        process.send_signal(signal.SIGTERM)
        printed = process.communicate(timeout=60)[0]
    assert process.returncode == Exit.STOPPED, printed
    assert "was moved, deleted or unlocked, and is taken up again" in " ".join(printed.split())
    assert main(["train", "--resume", str(run), "--steps", str(steps_saved(run)[-1] + 3), "-q"]) == 0


def test_metrics_that_cannot_be_written_do_not_cost_a_checkpoint(tmp_path: Path, photos: Path, tiny: Path) -> None:
    """Their rows wait, in checkpoints too, and come when there is a place for them; none is lost and none comes twice."""
    run = tmp_path / "run"
    aside = tmp_path / "aside.csv"
    with train_process(photos, "-c", tiny, "--out", run, *LONG) as process:
        wait_for(lambda: steps_saved(run), process)
        (run / "metrics.csv").rename(aside)
        (run / "metrics.csv").mkdir()
        last = steps_saved(run)[-1]
        wait_for(lambda: steps_saved(run)[-1] > last + 10, process)
        process.kill()
        process.wait()
    (run / "metrics.csv").rmdir()
    aside.rename(run / "metrics.csv")
    behind = len(rows(run))
    step = steps_saved(run)[-1]
    assert behind < step and len(state_of(run, step)["unwritten"]) > 0
    assert main(["train", "--resume", str(run), "--steps", str(step + 3), "-q"]) == 0
    assert contiguous(run) and len(rows(run)) == step + 3


def test_a_plot_that_fails_does_not_end_the_run(
    photos: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("could not open the font cache")

    monkeypatch.setattr("ddpmctl.plot.loss_curve", broken)
    assert main(["train", str(photos), "-c", str(tiny), "--out", "r"]) == 0
    assert "loss.png: cannot be drawn: could not open the font cache: going on" in capsys.readouterr().err


def test_old_checkpoints_that_cannot_be_deleted_do_not_end_the_run(
    photos: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".pt":
            raise PermissionError(13, "Permission denied", str(path))
        plain(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    settings = ["--set", "train.save_every=1", "--set", "train.keep=1"]
    assert main(["train", str(photos), "-c", str(tiny), "--out", "r", *settings]) == 0
    assert "checkpoints: cannot be written: Permission denied: going on" in capsys.readouterr().err
    assert steps_saved(Path("r")) == [1, 2, 3, 4, 5, 6]


def test_the_second_process_on_a_run_is_refused(
    tmp_path: Path, photos: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with train_process(photos, "-c", tiny, "--out", run, *LONG) as process:
        wait_for(lambda: steps_saved(run), process)
        for flags in (["--resume"], ["--overwrite"]):
            assert main(["train", str(photos), "-c", str(tiny), "--out", str(run), *flags]) == Exit.OUTPUT
            assert "another process is training in it" in capsys.readouterr().err
        assert main(["train", "--resume", str(run), "--dry-run"]) == 0, "looking is allowed"
        process.kill()
        process.wait()
    assert main(["train", "--resume", str(run), "--steps", str(steps_saved(run)[-1] + 2), "-q"]) == 0
    assert contiguous(run)


def test_two_processes_that_begin_the_same_run_at_once(tmp_path: Path, photos: Path, tiny: Path) -> None:
    run = tmp_path / "run"
    arguments = [photos, "-c", tiny, "--out", run, "--steps", "60"]
    with train_process(*arguments) as first, train_process(*arguments) as second:
        texts = [process.communicate(timeout=180)[0] for process in (first, second)]
    assert sorted([first.returncode, second.returncode]) == [0, Exit.OUTPUT], texts
    assert "Traceback" not in "".join(texts)
    assert steps_saved(run)[-1] == 60


def test_every_flipped_or_missing_byte_is_noticed(trained: Path, tmp_path: Path) -> None:
    """200 damaged copies: refused, or the very same tensors."""
    good = trained / "checkpoints" / "step-00000006.pt"
    content, data, dice = checkpoint.load(good), good.read_bytes(), random.Random(0)
    copy, refused = tmp_path / "copy.pt", 0
    for trial in range(200):
        damaged = bytearray(data)
        if trial % 4 == 3:
            del damaged[dice.randrange(len(data)) :]
        else:
            for _ in range(1 + trial % 3):
                damaged[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        copy.write_bytes(damaged)
        try:
            assert_same(checkpoint.load(copy), content)
        except CheckpointError as error:
            assert str(copy) in error.problem and "\n" not in error.problem
            refused += 1
    # Bytes of padding and of the archive's directory may change and change nothing.
    assert refused > 150
    print(f"\n{refused} of 200 damaged checkpoints refused, {200 - refused} with the very same content")


def test_a_damaged_checkpoint_is_never_sampled_and_the_error_names_the_good_one(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    newest = run / "checkpoints" / "step-00000006.pt"
    newest.write_bytes(spoilt(newest))
    for target in (run, newest):
        assert main(["sample", str(target), "-n", "1", "-o", "x.png"]) == Exit.CHECKPOINT
        shown = capsys.readouterr().err
        assert str(newest) in shown and "step-00000004.pt" in shown
    assert not Path("x.png").exists()


def test_a_checkpoint_that_carries_code_is_refused_and_the_code_not_run(tmp_path: Path) -> None:
    evil = tmp_path / "evil.pt"
    script = (
        "import os, sys, torch\n"
        "class Evil:\n"
        f"    def __reduce__(self): return (os.system, ('touch {tmp_path}/run-by-pickle',))\n"
        "torch.save({'magic': 'ddpmctl checkpoint', 'net': Evil()}, sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", script, evil], check=True)
    for command in (["sample"], ["inspect"], ["train", "--resume"]):
        assert main([*command, str(evil)]) != 0
    with pytest.raises(CheckpointError, match="code"):
        checkpoint.load(evil)
    assert not (tmp_path / "run-by-pickle").exists()


def test_the_older_checkpoint_goes_only_when_the_newer_one_is_there(
    photos: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    plain = checkpoint.save

    def save(path: Path, content: dict) -> str:
        before = set(steps_saved(Path("r"))) if Path("r").exists() else set()
        digest = plain(path, content)
        assert before <= set(steps_saved(Path("r")))
        saved.append(path)
        return digest

    monkeypatch.setattr(checkpoint, "save", save)
    settings = ["--set", "train.save_every=1", "--set", "train.keep=1", "-q"]
    assert main(["train", str(photos), "-c", str(tiny), "--out", "r", *settings]) == 0
    assert len(saved) == 6 and steps_saved(Path("r")) == [6]
    assert state_of(Path("r"), 6)["step"] == 6


def test_nothing_is_written_into_another_run_that_took_the_folders_place(tmp_path: Path, photos: Path, tiny: Path) -> None:
    run = tmp_path / "run"
    with train_process(photos, "-c", tiny, "--out", run, *LONG) as process:
        wait_for(lambda: steps_saved(run), process)
        process.send_signal(signal.SIGSTOP)  # or it would make the folder anew before the other run can
        run.rename(tmp_path / "moved")
        assert main(["train", str(photos), "-c", str(tiny), "--out", str(run), "-q"]) == 0
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        rows_moved = rows(tmp_path / "moved")
        process.send_signal(signal.SIGCONT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=3)
        process.send_signal(signal.SIGTERM)
        printed = process.communicate(timeout=60)[0]
    assert process.returncode == Exit.OUTPUT, printed
    assert f"{run}: something else stands in its place now" in printed and "Traceback" not in printed
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert rows(tmp_path / "moved") == rows_moved, "nor on in the folder that was taken away"
    last = steps_saved(tmp_path / "moved")[-1]
    assert main(["train", "--resume", str(tmp_path / "moved"), "--steps", str(last + 2), "-q"]) == 0
    assert contiguous(tmp_path / "moved")


def test_a_disk_that_is_full_from_the_start_leaves_a_place_to_start_again(small_disk: Path, photos: Path, tiny: Path) -> None:
    filler = fill(small_disk)
    command = ["train", str(photos), "-c", str(tiny), "--out", str(small_disk / "run"), "-q"]
    assert main(command) == Exit.OUTPUT
    filler.unlink()
    assert main(command) == 0


def test_a_start_that_fails_half_way_leaves_a_run_that_can_be_taken_up(
    photos: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Path.mkdir

    def mkdir(path: Path, *args: object, **options: object) -> None:
        if path.name == "checkpoints":
            raise OSError(28, "No space left on device")
        plain(path, *args, **options)  # type: ignore[arg-type]

    command = ["train", str(photos), "-c", str(tiny), "--out", "r", "-q"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", mkdir)
        assert main(command) == Exit.OUTPUT
    assert main([*command[:-1], "--resume"]) == 0
    assert steps_saved(Path("r"))[-1] == 6


def test_rows_that_could_not_be_written_at_the_end_come_when_the_run_is_called_again(
    photos: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ddpmctl.table import Table

    def flush(self: Table, *, to_disk: bool = False) -> None:
        raise OutputError(f"{self.path}: cannot be written: No space left on device", "")

    with monkeypatch.context() as patch:
        patch.setattr(Table, "flush", flush)
        assert main(["train", str(photos), "-c", str(tiny), "--out", "r"]) == 0
    assert capsys.readouterr().err.count("metrics.csv: cannot be written") == 1, "a fault that lasts is told once"
    assert main(["train", "--resume", "r"]) == 0
    assert [row["step"] for row in rows(Path("r"))] == ["2", "4", "6"]
    assert "nothing to do" not in capsys.readouterr().out
    assert main(["train", "--resume", "r"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_overwrite_leaves_the_run_of_another_program_alone(
    photos: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("theirs/checkpoints").mkdir(parents=True)
    Path("theirs/run.yaml").write_text("experiment: 7\n")
    Path("theirs/checkpoints/model.bin").write_bytes(b"precious")
    assert main(["train", str(photos), "-c", str(tiny), "--out", "theirs", "--overwrite"]) != 0
    assert "theirs" in capsys.readouterr().err
    assert Path("theirs/checkpoints/model.bin").read_bytes() == b"precious"


def test_a_kill_in_the_first_save_leaves_a_run_that_can_be_taken_up(
    photos: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Kill(BaseException):
        pass

    def killed(path: Path, content: dict) -> str:
        raise Kill

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", killed)
        with pytest.raises(Kill):
            main(["train", str(photos), "-c", str(tiny), "--out", "r", "-q"])
    assert len(rows(Path("r"))) == 2 and steps_saved(Path("r")) == []
    assert main(["train", "--resume", "r", "-q"]) == 0
    assert [row["step"] for row in rows(Path("r"))] == ["2", "4", "6"]


def test_a_run_that_another_process_has_gone_on_with_is_left_to_it(tmp_path: Path, photos: Path, tiny: Path) -> None:
    """Possible only where somebody deletes the lock."""
    run = tmp_path / "run"
    with train_process(photos, "-c", tiny, "--out", run, *LONG[:2], "--set", "train.sample_every=0", "--set", "train.save_every=100") as process:
        # Well past its last save: at that very step it would have nothing to write, and stop in peace.
        wait_for(lambda: steps_saved(run) and int(rows(run)[-1]["step"]) > steps_saved(run)[-1], process)
        process.send_signal(signal.SIGSTOP)
        (run / ".lock").unlink()
        last = steps_saved(run)[-1] + 300
        assert main(["train", "--resume", str(run), "--steps", str(last), "-q"]) == 0
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        printed = process.communicate(timeout=60)[0]
    assert process.returncode == Exit.OUTPUT, printed
    assert "another process has gone on with it" in printed
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_moved_folder_whose_new_one_cannot_be_begun_at_first_is_whole_in_the_end(
    photos: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddpmctl import training
    from ddpmctl.runfolder import RunFolder

    plain, draw, tries = RunFolder.write_text, training.add_gradients, []

    def write_text(self: RunFolder, file: Path, text: str) -> None:
        if Path("moved").exists():
            tries.append(file)
            if len(tries) == 1:
                raise OutputError(f"{file}: cannot be written: No space left on device", "")
        plain(self, file, text)

    def moving(state: training.TrainState, *args: object) -> object:
        if state.step == 2 and not Path("moved").exists():
            Path("r").rename("moved")
        return draw(state, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(RunFolder, "write_text", write_text)
    monkeypatch.setattr(training, "add_gradients", moving)
    command = ["train", str(photos), "-c", str(tiny), "--out", "r", "-q", "--set", "train.save_every=2", "--steps", "8"]
    assert main(command) == 0
    assert len(tries) == 2 and (Path("r") / "run.yaml").exists()
    assert main(["train", "--resume", "r", "--steps", "9", "-q"]) == 0


def test_old_checkpoints_that_cannot_be_deleted_do_not_spoil_a_stop(
    photos: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ddpmctl.runfolder import RunFolder
    from ddpmctl.stopping import StopFlag

    def prune(self: RunFolder, keep: int, planned: int) -> None:
        raise OutputError(f"{self.checkpoints}: cannot be written: Permission denied", "")

    monkeypatch.setattr(StopFlag, "reason", lambda self: "SIGTERM")
    monkeypatch.setattr(RunFolder, "prune", prune)
    assert main(["train", str(photos), "-c", str(tiny), "--out", "r"]) == Exit.STOPPED
    shown = capsys.readouterr()
    assert "Permission denied: going on" in shown.err and "by SIGTERM, saved" in shown.out


def test_overwrite_removes_what_a_run_has_made_and_nothing_else(photos: Path, tiny: Path) -> None:
    command = ["train", str(photos), "-c", str(tiny), "--out", "r", "-q"]
    assert main(command) == 0
    mine = [Path("r/checkpoints/step-00000004-best.pt"), Path("r/samples/mine.txt"), Path("r/notes.txt")]
    for path in mine:
        path.write_text("precious")
    assert main([*command, "--steps", "2", "--overwrite"]) == 0
    assert all(path.read_text() == "precious" for path in mine)
    mine[0].unlink()
    assert steps_saved(Path("r")) == [2] and [row["step"] for row in rows(Path("r"))] == ["2"]
    Path("theirs").mkdir()
    for text in ("", "seed: 7\n"):
        Path("theirs/run.yaml").write_text(text)
        Path("theirs/metrics.csv").write_text("precious")
        assert main([*command[:-3], "--out", "theirs", "--overwrite"]) == Exit.OUTPUT
        assert Path("theirs/metrics.csv").read_text() == "precious"


def test_a_row_whose_end_is_not_known_is_written_once(photos: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quotas on networks are told when a file is closed: of what was written then, all or nothing may be there."""
    from contextlib import contextmanager

    from ddpmctl import table

    plain, calls = table.output_errors, []

    @contextmanager
    def failing(path: Path):
        with plain(path):
            lost = path.read_bytes() if path.exists() else b""
            yield
            if path.name == "metrics.csv" and len(path.read_bytes()) > len(lost) > 0:
                calls.append(path)
                if len(calls) in (1, 3):
                    if len(calls) == 3:
                        path.write_bytes(lost)
                    raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(table, "output_errors", failing)
    settings = ["--set", "train.log_every=1", "--steps", "8"]
    assert main(["train", str(photos), "-c", str(tiny), "--out", "r", "-q", *settings]) == 0
    assert len(calls) > 3 and contiguous(Path("r")) and len(rows(Path("r"))) == 8
