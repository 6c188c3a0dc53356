"""The benchmark's own options, and what its JSON says of the machine."""

from __future__ import annotations

import pytest

from .machine import describe


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small shapes and few rounds: shows that the suite works")


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, object]:
    return describe()
