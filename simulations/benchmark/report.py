"""The form of every benchmark's result: a table for people, one JSON object for machines."""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

from rich.console import Console
from rich.table import Table

from common.files import write_atomic

PACKAGES = ("fedmedgan", "torch", "opacus", "flwr", "numpy")


@final
@dataclass(frozen=True)
class Result:
    """What a benchmark measured.

    Attributes:
        name: The benchmark.
        rows: One table row each; all rows have the same keys.
        ratios: Figures of merit by name, each from one run.
        samples: What the rows are made of, where a later call may go on from it.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
    ratios: Mapping[str, float]
    samples: Sequence[Mapping[str, Any]] = ()


def print_result(result: Result) -> None:
    """Print the rows and the ratios."""
    table = Table(title=result.name)
    for key in result.rows[0]:
        table.add_column(key, justify="right")
    for row in result.rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for name, value in result.ratios.items():
        console.print(f"{name} = {value:.4f}")


def write_result(result: Result, path: Path) -> None:
    """Write `{"name", "machine", "versions", "rows", "ratios"}` as JSON, and "samples" where there are any."""
    machine = {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()}
    versions = {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
    content = {
        "name": result.name,
        "machine": machine,
        "versions": versions,
        "rows": list(result.rows),
        "ratios": dict(result.ratios),
    }
    content |= {"samples": list(result.samples)} if result.samples else {}
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())
