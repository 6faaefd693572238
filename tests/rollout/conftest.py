"""What the tests of rollout engines share."""

from __future__ import annotations

from collections.abc import Generator

import pytest

import vllm_servers as servers


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows what the servers said."""
    report = yield
    if report.failed:
        report.sections += [(f"end of {one.log}", servers.tail(one.log)) for one in servers.STARTED]
    return report
