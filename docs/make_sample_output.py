"""Puts the output of a finished quickstart between the markers of README.md, and its figure beside this file.

    python docs/make_sample_output.py                       # runs the quickstart in a temporary folder, then reads it
    python docs/make_sample_output.py runs/quickstart       # reads a finished run; nothing is computed

The block is what `cai run quickstart` prints at its end, without the progress before it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
PICTURE = Path(__file__).with_name("quickstart.svg")
BEGIN = "<!-- sample output: `make sample-output` replaces what follows -->"
END = "<!-- end of sample output -->"


def finished_output(run: Path) -> str:
    """What `cai run` prints on stdout at the end of a finished run of the quickstart; its stages are reused.

    Raises SystemExit where the run is not finished with the settings that it has now.
    """
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    settings = [word for override in facts["overrides"] for word in ("--set", override)]
    arguments = ["run", "quickstart", "--runs", str(run.parent), *settings]
    planned = _cai([*arguments, "--dry-run"])
    if " 0 would run" not in planned:
        sys.exit(f"{run}: not finished, or made by other settings or an earlier version:\n{planned}")
    return shown(_cai(arguments), run.parent)


def shown(output: str, runs: Path) -> str:
    """The output with the usual folder of runs in its paths, without spaces at the ends of lines."""
    lines = [line.rstrip() for line in output.replace(f"{runs}/", "runs/").splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def sample_output(readme: str) -> str:
    """The block between the markers. Raises ValueError where they are absent."""
    return readme[readme.index(BEGIN) + len(BEGIN) : readme.index(END)].strip().removeprefix("```").removesuffix("```")


def with_sample_output(readme: str, output: str) -> str:
    """The text of README.md with another block between the markers. Raises ValueError where they are absent."""
    return f"{readme[: readme.index(BEGIN)]}{BEGIN}\n\n```\n{output}\n```\n\n{readme[readme.index(END) :]}"


def write_sample(run: Path, output: str) -> None:
    """Puts output and figure of a finished run where the pages show them."""
    README.write_text(with_sample_output(README.read_text(encoding="utf-8"), output), encoding="utf-8")
    comparison = json.loads((run / "latest.json").read_text(encoding="utf-8"))["comparison"]
    shutil.copyfile(run / comparison / "figure.svg", PICTURE)


def _cai(arguments: list[str]) -> str:
    """Runs `cai` with its progress on this terminal; its stdout."""
    environment = os.environ | {"PYTHONPATH": str(README.parent), "COLUMNS": "160"}
    command = [sys.executable, "-m", "cai", *arguments]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="folder of a finished run of the quickstart")
    arguments = parser.parse_args()
    if arguments.run is not None:
        write_sample(arguments.run, finished_output(arguments.run))
        return
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        output = shown(_cai(["run", "quickstart", "--on", "cpu-2-cores", "--runs", str(runs)]), runs)
        write_sample(runs / "quickstart", output)


if __name__ == "__main__":
    main()
