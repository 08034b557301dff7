"""`python -m diffusers_cogvideox` is the command `cogvideox`."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
