"""The command `cogvideox` as it is installed: Ctrl-C ends it in one line, also while the libraries are still being imported.

Beside the package, whose own import is what takes the time.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> int:
    """Run the command line of the process. Returns the exit status."""
    try:
        from diffusers_cogvideox.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("\ncogvideox: stopped\n")
        return 130
    return run()
