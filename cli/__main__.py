"""``python -m pglimits_cli``."""

from . import main

main()
