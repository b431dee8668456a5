"""`python -m ba_solver.training` is `ba-solver`."""

import sys

from .cli import main

sys.exit(main())
