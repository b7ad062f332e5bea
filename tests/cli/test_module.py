"""`python -m cai` is the command `cai`."""

from __future__ import annotations

import subprocess
import sys

import cai


def test_python_runs_the_package_like_the_command() -> None:
    process = subprocess.run([sys.executable, "-m", "cai", "--version"], capture_output=True, text=True, check=True)
    assert process.stdout == f"cai, version {cai.__version__}\n"
