"""The program `unisd`. The only room that sees argparse; imports nothing heavy until a subcommand runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from unisd_megatron.errors import RequestError, UnisdError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand. Exit status: 0 done; 1 the work failed or a check did not hold; 2 the request was wrong."""
    from unisd_megatron.cli.parser import parse

    leads = os.environ.get("RANK", "0") == "0"
    try:
        request = parse(sys.argv[1:] if arguments is None else arguments)
        return request.command(request)
    except UnisdError as error:
        if leads:
            print(f"unisd: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, RequestError) else 1
