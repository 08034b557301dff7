"""From model folders of diffusers to checkpoints of the original code (SAT).

python conversion/diffusers_to_sat.py INPUT OUTPUT [options of `cogvideox convert`]
"""

import sys

from diffusers_cogvideox.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:], "--to", "sat"]))
