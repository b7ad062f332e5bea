"""What a shell completes, asked for as bash asks: through environment variables."""

from __future__ import annotations

from pathlib import Path

import pytest
import toy_stages
from click.testing import CliRunner

from cai.cli import main


def completed(line: str) -> list[str]:
    """The words for the end of a command line."""
    words = line.split(" ")
    environment = {"_CAI_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    result = CliRunner(env=environment).invoke(main, [], prog_name="cai", complete_var="_CAI_COMPLETE")
    return [entry.partition(",")[2] for entry in result.stdout.splitlines() if entry.startswith("plain,")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with a run of toy stages."""
    monkeypatch.chdir(tmp_path)
    toy_stages.install(monkeypatch)
    toy_stages.make_recipe(tmp_path)
    result = CliRunner().invoke(main, ["run", "recipe.yaml"])
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("cai run quick", ["quickstart"]),
        ("cai run quickstart --until pol", ["policy"]),
        ("cai run quickstart --from comparison.p", ["comparison.policy", "comparison.policy.votes"]),
        ("cai run nobody --until pol", []),
        ("cai run quickstart --on 8gpu-zero", ["8gpu-zero2", "8gpu-zero3", "8gpu-zero3-offload"]),
        ("cai constitution show har", ["harmlessness"]),
        ("cai constitution show micro --principle h", ["harmless", "helpful", "honest"]),
        ("cai status t", ["toy"]),
        ("cai votes explain toy/t", ["toy/texts", "toy/tuned"]),
        ("cai votes try toy --principle k", ["kind"]),
        ("cai runs delete ", ["toy"]),
        ("cai constitution test micro --model toy/", ["toy/tuned", "toy/policy"]),
    ],
)
@pytest.mark.usefixtures("folder")
def test_names_are_completed(line: str, words: list[str]) -> None:
    assert completed(line) == words


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_every_shell_is_printed(shell: str) -> None:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert "_CAI_COMPLETE" in result.stdout
