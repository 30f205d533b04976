"""What a user can get wrong, as exceptions: one line of what is wrong, one of what to do, an exit code each."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of the command, printed by ``ddpmctl --help`` and the README."""

    OK = 0
    BUG = 1
    CONFIG = 2
    DATA = 3
    CHECKPOINT = 4
    DEVICE = 5
    OUTPUT = 6
    DIVERGED = 7
    RANKS = 8
    STOPPED = 75
    INTERRUPTED = 130


EXIT_MEANINGS: dict[Exit, str] = {
    Exit.OK: "done",
    Exit.BUG: "a bug in ddpmctl (a traceback is shown)",
    Exit.CONFIG: "wrong command line or run file",
    Exit.DATA: "images missing or unusable",
    Exit.CHECKPOINT: "checkpoint missing, damaged or of another kind",
    Exit.DEVICE: "device missing or out of memory",
    Exit.OUTPUT: "output exists already or cannot be written",
    Exit.DIVERGED: "training diverged",
    Exit.RANKS: "another process of the job has ended, or cannot be reached",
    Exit.STOPPED: "stopped by a signal or --max-time after saving; go on with --resume",
    Exit.INTERRUPTED: "interrupted, nothing saved since the last checkpoint",
}


class DdpmctlError(Exception):
    """A fault of the input, not of the program.

    ``problem`` names the file, key or flag; ``advice`` says what to do. Both are one line.
    """

    exit_code: Exit = Exit.CONFIG

    def __init__(self, problem: str, advice: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.advice = advice
        if advice and hasattr(self, "add_note"):  # from Python 3.11 on a traceback shows it
            self.add_note(advice)


class ConfigError(DdpmctlError):
    """A flag or a key of a run file is unknown, mistyped, or does not go with another."""

    exit_code = Exit.CONFIG


class DataError(DdpmctlError):
    """The images are missing, unreadable or too few."""

    exit_code = Exit.DATA


class CheckpointError(DdpmctlError):
    """A checkpoint or run folder is missing, damaged or does not fit."""

    exit_code = Exit.CHECKPOINT


class DeviceError(DdpmctlError):
    """The device asked for is not there, or is out of memory."""

    exit_code = Exit.DEVICE


class OutputError(DdpmctlError):
    """An output exists already, or its place cannot be written."""

    exit_code = Exit.OUTPUT


class DivergenceError(DdpmctlError):
    """Loss or gradients stopped being finite."""

    exit_code = Exit.DIVERGED


class RanksError(DdpmctlError):
    """Another process of the job has ended, or cannot be reached."""

    exit_code = Exit.RANKS
