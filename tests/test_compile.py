"""``train.compile``: real compilations, which take a minute."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runs import assert_same_run, state_of

pytestmark = pytest.mark.slow


def train(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ddpmctl", "train", *words]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def test_a_compiled_run_is_near_the_plain_one_and_resumes_exactly(photos, tiny):
    base = [str(photos), "-c", str(tiny), "--set", "model.dropout=0", "--set", "train.keep=9"]
    compiled = [*base, "--set", "train.compile=default"]
    for words in ([*base, "--out", "plain"], [*compiled, "--out", "whole"], [*compiled, "--out", "r", "--steps", "4"]):
        assert train(*words).returncode == 0
    assert train("--resume", "r", "--steps", "6").returncode == 0
    assert_same_run(Path("whole"), Path("r"))
    plain, ours = state_of(Path("plain"), 6)["net"], state_of(Path("r"), 6)["net"]
    assert not all(torch.equal(plain[name], ours[name]) for name in plain), "it was not compiled"
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-3, atol=1e-3)


def test_a_missing_compiler_is_one_clear_line(photos, tiny, tmp_path):
    words = [str(photos), "-c", str(tiny), "--set", "train.compile=default", "--out", "r"]
    done = train(*words, CXX="/nonexistent", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 5 and "Traceback" not in done.stderr
    assert "error: train.compile default: PyTorch's compiler failed: InvalidCxxCompiler" in done.stderr
    assert "--set train.compile=none" in done.stderr
