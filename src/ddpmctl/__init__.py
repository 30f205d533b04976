"""ddpmctl: a folder of images in, a trained denoising diffusion model and new images out.

::

    import ddpmctl

    run = ddpmctl.train("photos/", steps="100k", size=64, out="runs/photos")
    images = ddpmctl.load("runs/photos").sample(n=16, seed=0)
    print(ddpmctl.evaluate("runs/photos", "held-out-photos/").kid)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["DdpmctlError", "Evaluation", "Model", "TrainedRun", "evaluate", "load", "train", "train_events"]

if TYPE_CHECKING:
    from ddpmctl.api import Evaluation, Model, TrainedRun, evaluate, load, train, train_events
    from ddpmctl.errors import DdpmctlError


def __getattr__(name: str) -> Any:
    """What :data:`__all__` names is imported when it is first asked for: torch takes a second."""
    if name not in __all__:
        raise AttributeError(f"module 'ddpmctl' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("ddpmctl.errors" if name == "DdpmctlError" else "ddpmctl.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
