"""ddpmctl from Python: what the commands ``train``, ``sample`` and ``evaluate`` do, as functions. See ``docs/api.md``.

Everything a user can get wrong is a :class:`DdpmctlError`, which names arguments where those of the command line name flags. What
the commands print goes to the logger ``ddpmctl``: warnings are shown, the rest where the program asks for it.
"""

from ddpmctl.api.models import Model, load
from ddpmctl.api.scores import Evaluation, evaluate
from ddpmctl.api.training import TrainedRun, train, train_events

__all__ = ["Evaluation", "Model", "TrainedRun", "evaluate", "load", "train", "train_events"]
