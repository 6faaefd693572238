"""`unisd plan`, for those who look here. No logic: the program is in `unisd_megatron/cli`."""

import sys

from unisd_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
