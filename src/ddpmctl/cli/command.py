"""A command whose flags do not take each other for their values, and say what they lack."""

from __future__ import annotations

from itertools import chain, islice, repeat
from typing import Any

from typer.core import TyperCommand

from ddpmctl.errors import ConfigError


class Command(TyperCommand):
    """As Typer has it, which reads ``--interpolate a.png -o out.png`` as the pictures ``a.png`` and ``-o``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises :class:`ConfigError` where a flag, or the end, stands in place of another one's value; ``--out=-o`` is a value."""
        if not ctx.resilient_parsing:  # a line that a shell completes is not written to its end
            self._check_values(ctx, args)
        return super().parse_args(ctx, args)

    def _check_values(self, ctx: Any, args: list[str]) -> None:
        flags = {flag: option for option in self.get_params(ctx) for flag in option.opts if flag.startswith("-")}
        words = iter(args)
        for word in words:
            if word == "--":
                return
            option: Any = flags.get(word)
            if option is None or option.is_flag:
                continue
            needs, when = option.metavar or "a value", "then"
            for value in islice(chain(words, repeat(None)), option.nargs):
                if value is None or value in flags:
                    comes = "comes nothing" if value is None else f"comes the flag {value}"
                    raise ConfigError(f"{word}: needs {needs}, but {when} {comes}", f"write {word} {needs}")
                when = f"after {value}"
