"""``python -m ddpmctl``, the same program as the ``ddpmctl`` command."""

import sys

from ddpmctl.cli import main

if __name__ == "__main__":
    sys.exit(main())
