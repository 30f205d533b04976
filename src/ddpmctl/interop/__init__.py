"""Checkpoints of other tools, in and out: a module a format, and the table of them in :mod:`ddpmctl.interop.formats`."""
