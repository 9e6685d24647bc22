"""Shared rules of the test run."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

from numfit import native

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests run in several processes: one thread each, since thread pools that wait for one another by spinning collapse when
# cores are shared. Tests of thread counts set their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--native-library", metavar="FILE", help="CPU kernels to test instead of the installed ones")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--native-library")
    if path is not None:
        native.load(path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """With NUMFIT_REQUIRE_REAL set, a test that needs the real model may not skip: CI has fetched it."""
    report = yield
    if report.skipped and item.get_closest_marker("real") and os.environ.get("NUMFIT_REQUIRE_REAL"):
        report.outcome = "failed"
        report.longrepr = f"a test on the real model was skipped although NUMFIT_REQUIRE_REAL is set: {report.longrepr}"
    return report
