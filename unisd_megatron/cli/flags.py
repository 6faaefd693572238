"""argparse as this program uses it: one-line errors, and every flag with dashes or underscores."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from unisd_megatron.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag is one line and a `ConfigError`."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def flag(parser: Any, name: str, *more: str, **options: Any) -> None:
    """Adds `--a_b` and `--a-b`."""
    underscored, dashed = f"--{name}", f"--{name.replace('_', '-')}"
    parser.add_argument(*dict.fromkeys([dashed, underscored, *more]), dest=name, **options)


def command(subparsers: Any, name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(name, help=help, description=help, allow_abbrev=False)
    parser.set_defaults(command=run)
    return parser
