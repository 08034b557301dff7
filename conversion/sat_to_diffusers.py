"""From the original code's checkpoints (SAT) to model folders of diffusers.

python conversion/sat_to_diffusers.py INPUT OUTPUT [options of `cogvideox convert`]
"""

import sys

from diffusers_cogvideox.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:], "--to", "diffusers"]))
