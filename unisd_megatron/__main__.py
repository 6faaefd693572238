"""`python -m unisd_megatron`, the form that `torchrun -m` needs."""

import sys

from unisd_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main())
