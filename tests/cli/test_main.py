"""The program around the commands: help, version, exit codes, quiet, colours."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddpmctl import __version__
from ddpmctl.cli import main
from ddpmctl.config import RunConfig, known_keys
from ddpmctl.errors import EXIT_MEANINGS, Exit
from ddpmctl.runfile import flag_layer, resolve

COMMANDS = ("train", "sample", "noise-demo", "inspect")


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
    assert len(found) == 11
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


def test_ctrl_c_while_sampling_is_one_line_and_leaves_nothing(trained):
    command = [sys.executable, "-m", "ddpmctl", "sample", str(trained), "-n", "100000", "-o", "many.npz"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "images" in process.stdout.readline()
        deadline = time.monotonic() + 60
        while not list(Path().glob(".ddpmctl*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)  # well into the sampling, past the last import
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=60)
    assert process.returncode == Exit.INTERRUPTED
    assert shown.strip() == "error: interrupted"
    assert list(Path().glob("*.npz")) + list(Path().glob(".ddpmctl*")) == []


def test_a_name_that_no_terminal_can_show_is_shown_escaped():
    done = subprocess.run(
        [sys.executable, "-m", "ddpmctl", "train", b"caf\xe9"],
        capture_output=True, timeout=60, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == Exit.DATA and b"\\udce9" in done.stderr and b"Traceback" not in done.stderr


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
    done = run("--show-completion", "bash", SHELL="/bin/bash")
    assert done.returncode == 0 and "ddpmctl" in done.stdout


def test_a_reader_that_goes_away_is_no_error():
    piped = subprocess.run(
        f"{sys.executable} -m ddpmctl inspect --defaults | head -n 1", shell=True, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert piped.returncode == 0 and piped.stderr == ""


def test_it_runs_as_a_module_and_as_a_script():
    assert run("--version").stdout == f"ddpmctl {__version__}\n"
    script = Path(sys.executable).with_name("ddpmctl")
    if script.exists():
        assert (
            subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
            .stdout.strip()
            .endswith(__version__)
        )
