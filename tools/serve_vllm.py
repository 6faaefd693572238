"""Starts one vLLM server that `unisd train` can use. No logic: the program is `unisd_megatron/rollout/serve.py`."""

import sys

from unisd_megatron.rollout.serve import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
