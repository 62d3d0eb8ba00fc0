"""``python -m fxpass.cli``."""

from . import main

main()
