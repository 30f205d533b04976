"""The program around the commands: help, version, exit codes, quiet, colours."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from ddpmctl import __version__
from ddpmctl.cli import console, main
from ddpmctl.config import RunConfig, known_keys
from ddpmctl.errors import EXIT_MEANINGS, Exit
from ddpmctl.runfile import flag_layer, resolve

COMMANDS = ("train", "sample", "noise-demo", "inspect", "convert", "cache")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ddpmctl", *command],
        capture_output=True, text=True, timeout=120, env={**os.environ, **environment}, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_imports_nothing_heavy(command):
    program = (
        "import sys; from ddpmctl.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'torchvision', 'numpy', 'PIL', 'matplotlib'} & set(sys.modules); sys.exit(str(heavy) if heavy else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command, "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert not command or "Example: ddpmctl" in done.stdout.replace("`", "")


def test_help_lists_the_commands_and_the_exit_codes(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name in COMMANDS:
        assert name in printed
    for code in EXIT_MEANINGS:
        assert str(code.value) in printed
    assert set(EXIT_MEANINGS) == set(Exit)


def test_the_defaults_in_the_help_of_train_are_the_real_ones():
    printed = run("train", "--help", COLUMNS="200", NO_COLOR="1").stdout
    found = dict(re.findall(r"--([a-z-]+) .*\[default: ([^\]]+)\]", printed))
    found.pop("out")
    keys = {key.rpartition(".")[2].replace("_", "-"): key for key in known_keys()}
    assert len(found) == 13
    assert resolve(flag_layer({keys[flag]: value for flag, value in found.items()})) == RunConfig()


def test_no_command_shows_the_help(capsys):
    main([])
    assert "Usage" in "".join(capsys.readouterr())


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"ddpmctl {__version__}"


def test_an_unknown_command_is_one_line(capsys):
    assert main(["trian"]) == Exit.CONFIG
    shown = capsys.readouterr().err
    assert "trian" in shown and len(shown.strip().splitlines()) <= 2


def test_quiet_prints_errors_only(photos, tiny, capsys):
    assert main(["train", str(photos), "-c", str(tiny), "--steps", "1", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err == ""
    assert main(["train", "nowhere", "--quiet"]) == Exit.DATA
    assert "nowhere" in capsys.readouterr().err


def test_piped_output_is_plain_and_a_terminal_may_refuse_colours(photos, tiny):
    done = run("train", str(photos), "-c", str(tiny), "--out", "a", "--steps", "2")
    assert done.returncode == 0 and "\x1b" not in done.stdout + done.stderr
    assert "training 2/2 loss" in done.stdout
    coloured = run("inspect", str(tiny), FORCE_COLOR="1", TERM="xterm-256color")
    assert "\x1b[1;36m" in coloured.stdout
    plain = run("inspect", str(tiny), FORCE_COLOR="1", TERM="xterm-256color", NO_COLOR="1")
    assert "36m" not in plain.stdout


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("SIGINT", Exit.INTERRUPTED, "error: interrupted"),
        ("SIGTERM", 143, "error: interrupted by SIGTERM"),
        ("SIGHUP", 129, "error: interrupted by SIGHUP"),
    ],
)
def test_a_signal_while_sampling_is_one_line_and_leaves_nothing(trained, name, code, said):
    if signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        pytest.skip(f"{name} is ignored here, as in the background of a shell, and so it is by what is started")
    command = [sys.executable, "-m", "ddpmctl", "sample", str(trained), "-n", "100000", "-o", "many.npz"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "images" in process.stdout.readline()
        deadline = time.monotonic() + 60
        while not list(Path().glob(".ddpmctl*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)  # well into the sampling, past the last import
        process.send_signal(getattr(signal, name))
        try:
            _, shown = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code
    assert shown.strip() == said
    assert list(Path().glob("*.npz")) + list(Path().glob(".ddpmctl*")) == []


HALF_SAVED = """
import signal, sys
from PIL import Image
from ddpmctl.cli import main

def save(self, file, *rest, **options):
    file.write(b"half a picture")
    for _ in range(2):  # a terminal that closes sends two
        signal.raise_signal(signal.SIGHUP)

Image.Image.save = save
sys.exit(main(sys.argv[1:]))
"""


def test_a_signal_while_a_picture_is_written_leaves_nothing():
    Image.new("L", (8, 8)).save("grey.png")
    command = ["noise-demo", "grey.png", "--frames", "2", "--timesteps", "10"]
    done = subprocess.run([sys.executable, "-c", HALF_SAVED, *command], capture_output=True, timeout=60, check=False)
    assert done.returncode == 129 and done.stderr.decode().strip() == "error: interrupted by SIGHUP"
    assert [path.name for path in Path().iterdir()] == ["grey.png"]


def test_what_nohup_ignores_stays_ignored(monkeypatch, tiny, capsys):
    monkeypatch.setattr("ddpmctl.inspection.kind_of", lambda path: signal.raise_signal(signal.SIGHUP) or "run file")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main(["inspect", str(tiny)]) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_name_that_no_terminal_can_show_is_shown_escaped():
    done = subprocess.run(
        [sys.executable, "-m", "ddpmctl", "train", b"caf\xe9"],
        capture_output=True, timeout=60, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == Exit.DATA and b"\\udce9" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["sample X", "inspect X", "noise-demo X", "train X", "train photos --out X"])
@pytest.mark.parametrize("name", ["a" * 300 + ".png", "loop.png"])
def test_a_name_that_nothing_can_have_is_an_error_on_one_line(command, name, capsys):
    Path("loop.png").symlink_to("loop.png")
    Path("photos").mkdir()
    assert main(command.replace("X", name).split()) not in (Exit.OK, Exit.BUG)
    problem, advice = capsys.readouterr().err.splitlines()
    assert problem.startswith("error: ") and name in problem and advice.startswith("  -> ")


def test_names_move_no_cursor_and_break_no_line(capsys):
    assert main(["sample", "a\nb\x1b[31m\u202e"]) == Exit.CHECKPOINT
    assert capsys.readouterr().err.startswith("error: a\\nb\\x1b[31m\\u202e: no such checkpoint\n")
    console.note("x\ry")
    console.warn("x\ry")
    console.field("name", "x\ry")
    with console.bar("work", 1) as bar:
        bar.note("x\ry")
    shown = "".join(capsys.readouterr())
    assert shown.count(r"x\ry") == 4 and "\r" not in shown


@pytest.mark.parametrize(
    ("command", "fitting", "foreign"),
    [
        (["sample", "RUN"], "-o folder/", "train."),
        (["train", "PHOTOS", "-c", "tiny.yaml"], "train.grad_accum", "-n"),
        (["noise-demo", "PHOTOS/cats/image 1.png"], "--frames", "--batch-size"),
    ],
)
def test_advice_on_memory_names_flags_of_the_command(monkeypatch, trained, photos, tiny, capsys, command, fitting, foreign):
    def too_much(*args, **options):
        raise MemoryError

    for name in ("ddpmctl.sampling.generate", "ddpmctl.run.Run.train", "ddpmctl.noise_demo.demo.Demo.still"):
        monkeypatch.setattr(name, too_much)
    command = [word.replace("RUN", str(trained)).replace("PHOTOS", str(photos)) for word in command]
    assert main(command) == Exit.DEVICE
    shown = capsys.readouterr().err
    assert "out of memory" in shown and fitting in shown and foreign not in shown


def test_debug_shows_the_traceback(capsys):
    assert main(["train", "nowhere", "--debug"]) == Exit.DATA
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch, tiny):
    monkeypatch.setattr("ddpmctl.inspection.kind_of", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["inspect", str(tiny)])


def test_shell_completion_knows_the_choices(tmp_path):
    found = run("sample", _DDPMCTL_COMPLETE="complete_bash", COMP_WORDS="ddpmctl train x --schedule ", COMP_CWORD="4")
    words = found.stdout.split()
    if found.returncode == 0 and words:
        assert {"linear", "cosine", "sigmoid"} <= set(words)
    done = in_a_shell("ddpmctl --show-completion")  # which looks for the shell among the processes above it
    assert done.returncode == 0 and "ddpmctl" in done.stdout


def test_shell_completion_of_a_flag_that_waits_for_its_value():
    found = run("sample", _DDPMCTL_COMPLETE="complete_bash", COMP_WORDS="ddpmctl sample run --sampler ", COMP_CWORD="4")
    assert found.returncode == 0 and "dpm++sde" in found.stdout.split()
    half = run("sample", _DDPMCTL_COMPLETE="complete_bash", COMP_WORDS="ddpmctl sample run --interpolate a.png ", COMP_CWORD="5")
    assert half.returncode == 0 and not half.stderr


def in_a_shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The exit code is that of ddpmctl, whatever stands behind the pipe."""
    return subprocess.run(
        ["bash", "-c", f'ddpmctl() {{ "$PYTHON" -m ddpmctl "$@"; }}; set -o pipefail; {line}'], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHON": sys.executable, **environment},
    )  # fmt: skip


@pytest.mark.parametrize("command", ["inspect --defaults", "--help", "--version"])
def test_a_reader_that_goes_away_is_no_error(command):
    piped = in_a_shell(f"ddpmctl {command} | true")
    assert piped.returncode == 0 and piped.stderr == ""
    assert in_a_shell("ddpmctl inspect nothing 2>&1 | true").returncode == Exit.CONFIG


@pytest.mark.parametrize(
    ("gone", "terminal"),
    [("| head -n 1", "dumb"), ("| head -n 1", "xterm"), ("2>&1 | true", "xterm"), ("> /dev/full", "xterm")],
)
def test_training_outlives_its_reader(photos, tiny, gone, terminal):
    line = f"ddpmctl train '{photos}' -c {tiny} --out run {gone}"
    done = in_a_shell(line, FORCE_COLOR="1", TERM=terminal)  # with and without a bar
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert (Path("run") / "checkpoints" / "step-00000006.pt").is_file()


@pytest.mark.parametrize(
    "command",
    ["inspect --defaults > /dev/full", "inspect tiny.yaml > /dev/full", "--help > /dev/full", "--version >&-"],
)
def test_a_result_that_cannot_be_printed_is_an_error(tiny, command):
    done = in_a_shell(f"ddpmctl {command}")
    assert done.returncode == Exit.OUTPUT
    assert done.stderr.startswith("error: stdout: cannot be written: ") and len(done.stderr.splitlines()) == 2


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    screen = io.StringIO()
    dumb = Console(file=screen, force_terminal=True, width=100, _environ={"TERM": "dumb"})
    monkeypatch.setattr(console, "out", dumb)
    with console.bar("sampling", 10) as shown:
        shown.update(10, "7/8 images")
    assert screen.getvalue() == "sampling 10/10 7/8 images\n"


@pytest.mark.parametrize("width", [40, 79, 100, 200])
def test_a_bar_leaves_room_for_the_echo_of_ctrl_c(monkeypatch, width):
    screen = io.StringIO()
    monkeypatch.setattr(console, "out", Console(file=screen, force_terminal=True, width=width, legacy_windows=False))
    with console.bar("sampling", 10) as shown:
        shown.update(10, "7/8 images")
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n").splitlines()
    assert any("10/10" in line for line in lines)
    assert max(len(line) for line in lines) <= width - 4


def test_it_runs_as_a_module_and_as_a_script():
    assert run("--version").stdout == f"ddpmctl {__version__}\n"
    script = Path(sys.executable).with_name("ddpmctl")
    if script.exists():
        assert (
            subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
            .stdout.strip()
            .endswith(__version__)
        )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sample", "run", "--interpolate", "a.png", "-o", "out.png"], "--interpolate: needs A B, but after a.png comes the flag -o"),
        (["sample", "run", "--interpolate", "-o", "out.png", "a.png", "b.png"], "--interpolate: needs A B, but then comes the flag -o"),
        (["sample", "run", "-o", "--overwrite"], "-o: needs PATH, but then comes the flag --overwrite"),
        (["sample", "run", "-o", "--help"], "-o: needs PATH, but then comes the flag --help"),
        (["train", "photos", "--init-from", "--dry-run"], "--init-from: needs PATH, but then comes the flag --dry-run"),
        (["inspect", "run", "--json", "--debug", "--nothing"], "No such option"),
        (["sample", "run", "--interpolate", "a.png"], "--interpolate: needs A B, but after a.png comes nothing -> write --interpolate A B"),
        (["sample", "run", "--interpolate"], "--interpolate: needs A B, but then comes nothing"),
        (["sample", "run", "-n"], "-n: needs COUNT, but then comes nothing"),
    ],
)
def test_a_flag_is_not_taken_for_the_value_of_another(words, told, capsys):
    assert main(words) == Exit.CONFIG
    shown = " ".join(capsys.readouterr().err.split())
    assert told in shown and not list(Path().iterdir())


def test_a_value_that_looks_like_a_flag_can_be_given(trained):
    assert main(["sample", str(trained), "-n", "1", "--steps", "1", "--out=-o.png"]) == 0
    assert main(["sample", str(trained), "-n", "1", "--steps", "1", "-o", "-q.png"]) == 0
    assert Path("-o.png").is_file() and Path("-q.png").is_file()
