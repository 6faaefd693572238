"""`unisd report`: its flags. Heavy imports are inside."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from unisd_megatron.cli.commands import leads, say
from unisd_megatron.cli.flags import command, flag
from unisd_megatron.errors import ConfigError


def add_report(subparsers: Any) -> None:
    """The subcommand."""
    parser = command(subparsers, "report", report, "Pages and pictures of runs, or of a sweep: one HTML file each, PNG beside.")
    parser.add_argument("sources", nargs="+", metavar="RUN_OR_SWEEP", help="folders of runs, or of one sweep")
    flag(parser, "output_dir", required=True, help="new folder, or that of an earlier report, which is replaced")
    flag(parser, "before", metavar="DIR", help="finished evaluation of the checkpoint that a run started from")
    flag(parser, "after", metavar="DIR", help="finished evaluation of what the run made, of the same questions")


def report(request: argparse.Namespace) -> int:
    if (request.before is None) != (request.after is None):
        raise ConfigError("--before and --after go together; give both or neither")
    if not leads():
        return 0
    from unisd_megatron.report.run import report as carry_out

    evaluated = None if request.before is None else (Path(request.before), Path(request.after))
    for line in carry_out([Path(source) for source in request.sources], Path(request.output_dir), evaluated):
        say(line)
    return 0
