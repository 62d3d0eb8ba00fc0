"""The command line: ``fxpass inspect``, ``graph``, ``memory``, ``report``, ``passes``, ``explain``...

One command a file. It stands on top of everything else and nothing imports it.
"""

from __future__ import annotations

import sys
import warnings


def main() -> None:
    """Run the command line; exits with 2 if its extra is not installed."""
    try:
        import click as click
        import rich as rich
    except ImportError as error:
        print(f"fxpass: the command line needs {error.name}: pip install 'fxpass[cli]'", file=sys.stderr)
        sys.exit(2)

    # torch's own notices; what the user's code warns of stays
    warnings.filterwarnings("ignore", module=r"torch\.")

    from .app import run

    sys.exit(run(sys.argv[1:]))
