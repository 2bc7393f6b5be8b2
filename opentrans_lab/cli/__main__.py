"""``python -m opentrans_lab.cli``."""

from . import main

main()
