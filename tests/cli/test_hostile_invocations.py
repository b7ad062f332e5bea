"""Wrong paths, devices, documents, models and values end in one sentence and the right exit code, not a traceback."""

from __future__ import annotations

import os
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from cai.cli import main
from cai.storage.refusals import refused_output

ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcde", "bcdef", strict=True)
)
FILES = {
    "a-file": b"x",
    "bytes.yaml": bytes(range(256)),
    "empty.yaml": b"",
    "deep.yaml": b"a: " + b"[" * 5000,
    "aliases.yaml": ALIASES.encode(),
    "model/config.json": b'{"model_type": ',
    "prompts.jsonl": b'{"prompt": 1}\n',
}
INVOCATIONS = [
    ("run quickstart --runs /dev/null/x", 2, "/dev/null/x/quickstart: not a directory"),
    ("run quickstart --runs /proc/x", 2, "/proc/x: no such file or directory"),
    ("run quickstart --runs a-file/x", 2, "a-file/x/quickstart: not a directory"),
    ("run quickstart --name ../../etc", 2, "found the name '../../etc', expected up to 60 letters"),
    ("run /dev/null", 2, "/dev/null: no such file"),
    ("run model", 2, "no recipe 'model', expected a file or one of any-model"),
    ("run bytes.yaml", 2, "bytes.yaml:2:118: found bytes that are not UTF-8"),
    ("run empty.yaml", 2, "empty.yaml:1:1: found an empty document"),
    ("run deep.yaml", 2, "deep.yaml:1:63: found more than 60 levels"),
    ("run aliases.yaml", 2, "aliases.yaml:6:8: found more than 100,000 values"),
    ("run no-such-recipe", 2, "no recipe 'no-such-recipe'"),
    ("run quickstart --on model", 2, "no profile 'model'"),
    ("run quickstart --on empty.yaml", 2, "empty.yaml:1:1: found an empty document"),
    ("run quickstart --set =", 2, "--set =: expected key=value"),
    ("run quickstart --set a.b.c=1", 2, "--set a.b.c=1: a: unknown key"),
    ("run quickstart --set seed=-1", 2, "--set seed=-1: seed: found the number -1"),
    ("run quickstart --set seed=1e400", 2, "--set seed=1e400: seed: found the number inf"),
    ("run quickstart --set model=model", 2, "model 'model': "),
    ("run quickstart --set model=/dev/null", 2, "model '/dev/null': no such folder"),
    ("run quickstart --until nobody", 2, "--until nobody: no such stage"),
    ("run quickstart --report-to x", 2, "--report-to x: expected some of"),
    ("run quickstart --bogus", 2, "cai run: No such option '--bogus'. "),
    ("ruin quickstart", 2, "cai: No such command 'ruin'. "),
    ("plan quickstart --gpu-memory 0", 2, "cai plan: Invalid value for '--gpu-memory': 0.0 is not in the range x>0. "),
    ("plan quickstart --model-config model", 2, "cai plan: Invalid value for '--model-config': File 'model' is a "),
    ("status --runs a-file", 2, "cai status: Invalid value for '--runs': Directory 'a-file' is a file. "),
    ("status nobody", 2, "no run 'nobody' in runs"),
    ("show nobody x", 2, "no run 'nobody' in runs"),
    ("clean nobody --yes", 2, "no run 'nobody' in runs"),
    ("fork nobody other", 2, "no run 'nobody' in runs"),
    ("init /dev/null/x", 2, "/dev/null/x/constitutions"),
    ("init /proc/x", 2, "/proc/x: no such file or directory"),
    ("init a-file/x", 2, "a-file/x/constitutions"),
    ("constitution schema --write /dev/null/x", 2, "/dev/null/x: not a directory"),
    ("constitution schema --write /dev/full", 3, "/dev/full: no space left on device|standard output: no space left"),
    ("recipe schema --write no/such/x.json", 2, "no/such/x.json: no such file or directory"),
    ("constitution check /dev/zero", 2, "/dev/zero:1:1: found a file of more than 5,000,000 bytes"),
    ("constitution check model", 2, "model: found a folder, expected a YAML file"),
    ("constitution show harmlessness --principle nope", 2, "no principle 'nope'|'nope'"),
    ("constitution test micro --model nobody", 2, "'nobody'"),
    ("constitution test micro --templates nope", 2, "no template set 'nope'"),
    ("judge attack --model model", 2, "model 'model': "),
    (
        "judge attack --per-family 1",
        2,
        "cai judge attack: Invalid value for '--per-family': 1 is not in the range x>=2. ",
    ),
    ("votes diff a b", 2, "no run 'a' in runs"),
    ("votes try nobody --principle a --text b", 2, "no run 'nobody' in runs"),
    ("compare a=micro --prompts /dev/null", 2, "/dev/null: cannot tell the format"),
    ("compare a=micro b=micro --prompts prompts.jsonl", 2, "prompts.jsonl:1: "),
    ("compare a= --prompts micro:test", 2, "found 'a=', expected NAME=MODEL"),
    ("compare a=micro --prompts micro:nosplit", 2, "no split 'nosplit' of source micro"),
    ("compare a=model b=micro --prompts micro:test", 2, "model 'model': |/model has no weights"),
    ("compare a=micro b=micro --prompts micro:test --runs /dev/null/x", 2, "/dev/null/x/compare-"),
    ("micro pretrain /dev/null/x", 2, "/dev/null/x: not a directory"),
]


@pytest.fixture
def hostile_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with files that no command can use."""
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("invocation", "code", "sentence"), INVOCATIONS, ids=[entry[0] for entry in INVOCATIONS])
@pytest.mark.usefixtures("hostile_folder")
def test_a_hostile_invocation_ends_in_one_sentence(invocation: str, code: int, sentence: str) -> None:
    result = CliRunner().invoke(main, shlex.split(invocation))
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.stderr
    assert any(part in result.stderr for part in sentence.split("|")), result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr


def test_output_that_has_no_room_is_one_sentence(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "wb") as full:
        process = subprocess.run(
            [sys.executable, "-m", "cai", "constitution", "show", "harmlessness", "--json"],
            stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False,
        )  # fmt: skip
    assert (process.returncode, process.stderr) == (3, "standard output: no space left on device\n")


def written_beyond_the_limit(write: Callable[[Path], None], folder: Path) -> str:
    """The sentence for an error of `write` in a process whose files may have 1 MB."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
            write(folder / "file")
            os.write(writing, b"written")
        except Exception as error:
            os.write(writing, str(refused_output(error, folder)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with open(reading, encoding="utf-8") as file:
        return file.read()


@pytest.mark.parametrize(
    "write",
    [
        lambda path: save_file({"w": torch.zeros(1 << 20)}, path),
        lambda path: torch.save({"w": torch.zeros(1 << 20)}, path),
        lambda path: path.write_bytes(bytes(1 << 22)),
    ],
    ids=["safetensors", "torch", "plain"],
)
def test_a_checkpoint_without_room_says_what_to_do(write: Callable[[Path], None], tmp_path: Path) -> None:
    sentence = written_beyond_the_limit(write, tmp_path)
    assert re.fullmatch(
        rf"{tmp_path}(/file)?: (file too large|input/output error); what is finished is kept, and the same command "
        "goes on from there", sentence,
    ), sentence  # fmt: skip
