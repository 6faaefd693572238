"""The program `unisd`. The only room that sees argparse; imports nothing heavy until a subcommand runs."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence

from unisd_megatron.errors import LostContact, RequestError, UnisdError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand. Exit status: 0 done; 1 the work failed or a check did not hold; 2 the request was wrong."""
    from unisd_megatron.cli.parser import parse

    try:
        request = parse(sys.argv[1:] if arguments is None else arguments)
        return request.command(request)
    except KeyboardInterrupt:
        # Not left to Python, which forgets what ended it where a library runs code at exit.
        print("unisd: interrupted", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:
        # Who read this has what they wanted, as behind `| head`. Nor may Python meet the pipe again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except LostContact as error:
        _end_without_peers(error)
        return 1
    except UnisdError as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            # Where rank 0 met the same error it says so and torchrun ends the others; else this rank must speak.
            time.sleep(3)
        where = "" if rank == "0" else f" (rank {rank})"
        print(f"unisd{where}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, RequestError) else 1


def _end_without_peers(error: LostContact) -> None:
    """Says it once for each host and ends the process at once: destructors of groups, engines and threads wait for peers."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(3)  # the host's first rank speaks, and torchrun ends the others; unless that rank is not hit
    print(f"unisd: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if "RANK" in os.environ:
        os._exit(1)
