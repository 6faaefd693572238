"""The sandbox of the tests."""

import subprocess

import pytest

from unisd_megatron.errors import ConfigError
from unisd_megatron.evaluate.sandbox import Limits, Sandbox


def sandbox_or_skip(limits: Limits | None = None) -> Sandbox:
    """Skips only where the kernel refuses namespaces to others too: a broken sandbox must not look like a poor machine."""
    try:
        return Sandbox(limits)
    except ConfigError as error:
        command = ["unshare", "--user", "--map-root-user", "--mount", "--net", "--ipc", "--pid", "--fork", "true"]
        try:
            offered = subprocess.run(command, capture_output=True).returncode == 0
        except FileNotFoundError:
            offered = False
        if offered:
            raise
        pytest.skip(str(error))
