"""Every benchmark runs alone, and its last line is one JSON object. What it measures is nobody's business here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).parents[1] / "benchmarks").glob("[!_]*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_runs_alone_and_ends_with_its_figures(path: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, path, "--quick"], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bench"] == path.stem
    assert {"ours", "plain", "unit", "ratio", "sizes", "versions", "hardware"} <= found.keys()
