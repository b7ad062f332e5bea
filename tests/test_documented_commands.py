"""Every command in README.md, docs/ and the examples of `--help` is run, as it stands or as `TREATMENTS` says.

The commands of a block run one after another in a folder that holds what they name: a project of `cai init`, the
documents that the pages show, and a finished quickstart of a few prompts. What no treatment covers runs as it stands
and has to end with exit code 0. Commands of a page that are only named in a sentence have to exist, options included.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import documented_commands
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from documented_commands import PAGES, ROOT, Block, load_script

from cai import __version__
from cai.cli import main
from cai.models.reference import MICRO
from cai.prompt_sets import PromptSet, read_prompt_set
from cai.prompt_sets.prompt_set_config import Columns
from cai.prompt_sets.row_formats import Row, row_messages
from cai.storage import run_folder
from cai.storage.rows import read_rows

FENCES = re.MULTILINE | re.DOTALL
make_sample_output = load_script("docs/make_sample_output.py")

SMALL = [
    "prompts.red_team.limit=3", "prompts.helpful.limit=2", "prompts.borderline.limit=1", "prompts.heldout.limit=2",
    "prompts.heldout_verbs.limit=2", "stages.responses.max_new_tokens=48", "stages.revisions.rounds=1",
    "stages.revisions.max_new_tokens=24", "stages.candidates.max_new_tokens=48",
    "stages.sl-cai.train.max_steps=1", "stages.reward.train.max_steps=1", "stages.policy.train.max_steps=1",
    "stages.comparison.max_new_tokens=16",
]  # fmt: skip
"""Settings of the quickstart that make it run in seconds."""
SMALL_OPTIONS = " ".join(f"--set {setting}" for setting in SMALL)


class Treatment(NamedTuple):
    """How commands that match `pattern` are run, and why not as they stand."""

    pattern: str
    reason: str
    add: str = ""
    """Options that are added."""
    before: tuple[str, ...] = ()
    """Commands that make what the command needs."""
    exit_codes: frozenset[int] = frozenset({0})
    parsed: bool = False
    """Only parsed: the command, its options and their values exist."""


TREATMENTS = [
    Treatment(r"--dry-run", "is a dry run already"),
    Treatment(r"cai run .*--on (1gpu|8gpu-\S+|server|vllm)", "GPUs or a server; a dry run has their profile",
              add="--dry-run"),
    Treatment(r"cai run .*mine\.yaml", "half a minute of work, as the quickstart before it", add="--dry-run"),
    Treatment(r"cai run (cai-|rlaif-direct|online-dpo|best-of-n)", "minutes of work", add="--dry-run"),
    Treatment(r"cai run .*model=my-micro", "minutes of work", add="--dry-run", before=("cp -r my-model my-micro",)),
    Treatment(r"cai run .*(policy\.train\.beta|--from policy)", "trains and compares again", add="--dry-run"),
    Treatment(r"cai run .*--name (reworded|kinder) ", "minutes at its full size", add=SMALL_OPTIONS),
    Treatment(r"cai run (\S+/)?quickstart", "minutes at its full size", add=SMALL_OPTIONS),
    Treatment(r"cai init", "the prepared folder has a project", before=("rm -r my-project",)),
    Treatment(r"cai compare", "minutes at its full size", add="--limit 2 --set stages.comparison.max_new_tokens=8"),
    Treatment(r"cai judge attack .*--max-flip-rate", "minutes; few pairs say nothing about the limit", parsed=True),
    Treatment(r"cai judge attack", "minutes at its full size", add="--per-family 2"),
    Treatment(r"cai constitution test .*my-project/constitutions/(mine|help-desk)", "an untrained wording",
              exit_codes=frozenset({0, 1})),
    Treatment(r"cai micro pretrain", "70 minutes, or a GPU", parsed=True),
    Treatment(r"cai micro evaluate", "half a minute for two topics", parsed=True),
    Treatment(r"cai show quickstart 3f9a", "ids of this run are others", before=("PROMPT ID",)),
    Treatment(r"cai runs delete compare-", "no comparison is called so", before=("cai fork my-run compare-3f9a2b1c",)),
    Treatment(r"cai runs delete other-beta", "nothing is called so", before=("cai fork quickstart other-beta",)),
    Treatment(r"cai votes diff quickstart my-run", "runs with pairs in common",
              before=("cai runs delete my-run --yes", "cai fork quickstart my-run")),
    Treatment(r"cai votes diff my-run/by-micro", "a run of two judges",
              before=("cai runs delete my-run --yes", "cai run two-judges.yaml")),
]  # fmt: skip
"""The first that matches counts."""

NOT_RUN = {
    r"python3 -m venv \.venv$": "makes an environment",
    r"\. \.venv/bin/activate$": "changes the shell that it is typed into",
    r"pip install \.$": "installs the project as the tests' own environment has it",
    r"pip wheel --no-deps -w dist \.$": "builds a wheel, a minute of work",
    rf"pip install dist/constitutional_ai-{re.escape(__version__)}-py3-none-any\.whl$": "changes the environment",
}
"""Commands of other programs that change the environment, and why they are not run."""

STATEFUL = re.compile(r"(cai (init|fork|clean|runs delete)|cp|sed|rm) ")
"""Commands after which the same command may do something else."""


def all_blocks() -> list[Block]:
    pages = [block for page in PAGES for block in documented_commands.page_blocks(page)]
    return [*pages, *documented_commands.help_blocks()]


BLOCKS = all_blocks()


def treatment(command: str) -> Treatment:
    matching = (entry for entry in TREATMENTS if re.search(entry.pattern, command))
    return next(matching, Treatment("", "runs as it stands"))


def cai(words: list[str]) -> Result:
    """Runs the words after `cai`, with paths expanded as a shell does and questions answered by yes."""
    paths = [sorted(map(str, Path().glob(word))) if "*" in word else [word] for word in words]
    environment, n_threads = dict(os.environ), torch.get_num_threads()
    try:
        return CliRunner().invoke(main, [word for expanded in paths for word in expanded], input="y\n")
    finally:  # a profile sets both
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(n_threads)


def shown_documents() -> Iterator[tuple[str, str]]:
    """Path and text of the YAML documents in the pages that begin with a comment with their path."""
    for page in PAGES:
        for text in re.findall(r"^```yaml\n(.*?)^```$", page.read_text(encoding="utf-8"), FENCES):
            if match := re.match(r"# (\S+\.yaml)\n", text):
                yield match[1], text


def human_pair(number: int) -> dict[str, str]:
    question = f"\n\nHuman: How do I paint {number} walls?\n\nAssistant: "
    return {"chosen": f"{question}First you make a plan.", "rejected": f"{question}I will not help with that."}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with what the commands name: a project, documents, a model, prompts, the runs quickstart and my-run."""
    folder = tmp_path_factory.mktemp("documented")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cai(["init", "my-project"]).exit_code == 0
        constitutions = folder / "my-project" / "constitutions"
        micro = (constitutions / "micro.yaml").read_text(encoding="utf-8")
        for name in ("mine.yaml", "colleague.yaml"):
            (folder / name).write_text(micro, encoding="utf-8")
        for name, question in (("edited.yaml", "Which response is more helpful?"), ("kinder.yaml", "less harm?")):
            assert question in micro
            (constitutions / name).write_text(micro.replace(question, "Which response is kinder?"), encoding="utf-8")
        for path, text in shown_documents():
            (folder / path).write_text(text, encoding="utf-8")
        shutil.copytree(ROOT / "constitutions", folder / "constitutions")
        shutil.copytree(ROOT / "configs", folder / "configs")
        shutil.copytree(MICRO, folder / "my-model")
        (folder / ".venv-vllm" / "bin").mkdir(parents=True)
        (folder / ".venv-vllm" / "bin" / "python").touch()
        (folder / "questions.csv").write_text("question,topic\nHow do I paint a wall?,walls\n", encoding="utf-8")
        evaluate = next(block for block in BLOCKS if block.source == "cai micro evaluate --help")
        (folder / "mine.jsonl").write_text(evaluate.commands[-1], encoding="utf-8")
        shape = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096}
        (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
        with gzip.open(folder / "harmless-base.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write("".join(json.dumps(human_pair(number)) + "\n" for number in range(4)))
        (folder / "my-run.yaml").write_text(MY_RUN, encoding="utf-8")
        (folder / "two-judges.yaml").write_text(MY_RUN + OTHER_JUDGE, encoding="utf-8")
        for words in (["run", "quickstart", *SMALL_OPTIONS.split()], ["run", "my-run.yaml"]):
            result = cai(words)
            assert result.exit_code == 0, result.output
            (folder / f"{words[1]}.out").write_text(result.stdout, encoding="utf-8")
    return folder


MY_RUN = """
name: my-run
model: micro
constitution: mine.yaml
stages:
  - {id: votes, kind: judge, human: {source: harmless-base.jsonl.gz, tags: [helpful]}, principles: [helpful, polite]}
  - {id: by-micro, kind: prefer, from: votes}
"""
OTHER_JUDGE = """\
  - {id: others, kind: judge, judge: my-model, human: {source: harmless-base.jsonl.gz, tags: [helpful]}}
  - {id: by-another, kind: prefer, from: others}
"""


def copy_file(source: str, target: str) -> None:
    """Copies a file; large ones, which are replaced and never changed, are linked."""
    if source.endswith(".safetensors"):
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def run_cai(command: str) -> None:
    """Runs a `cai` command as its treatment says."""
    how = treatment(command)
    _, click_command, rest = documented_commands.resolved(shlex.split(command))
    if how.parsed:
        click_command.make_context("cai", rest)
        return
    words = shlex.split(f"{command} {how.add}")[1:]
    for preparation in how.before:
        if preparation == "PROMPT ID":
            responses = run_folder.latest(Path("runs/quickstart"))["responses"]
            words[-1] = next(iter(read_rows(responses / "records.jsonl")))["prompt_id"][:4]
        elif preparation.startswith("cai fork") and Path("runs", preparation.split()[-1]).exists():
            continue  # an earlier command of the block has made it
        elif preparation.startswith("cai "):
            prepared_by = cai(shlex.split(preparation)[1:])
            assert prepared_by.exit_code == 0, f"{preparation}\n{prepared_by.output}"
        else:
            subprocess.run(shlex.split(preparation), check=True)
    result = cai(words)
    assert result.exit_code in how.exit_codes, f"{command} {how.add}\n{result.output}"
    if "--json" in words:
        json.loads(result.stdout)


def run_make(command: str) -> None:
    """The Makefile has the target; running it may take an hour."""
    target = command.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"no target {target}"


def run_python(command: str) -> None:
    """The script is there and has the options; running one takes minutes to hours."""
    words = shlex.split(command)
    source = (ROOT / words[1]).read_text(encoding="utf-8")
    for word in words[2:]:
        assert f'"{word}"' in source if word.startswith("--") else (ROOT / word).exists(), f"{command}: {word}"


def run_sbatch(command: str) -> None:
    """Slurm is absent here: the script is there, and the recipe can be planned under the profile that it names."""
    _, script, recipe = shlex.split(command)
    profile = Path(script).stem
    assert f"--on {profile}" in Path(script).read_text() or profile in Path(script).read_text()
    run_cai(f"cai run {recipe} --on {profile} --dry-run")


def run_in_shell(command: str) -> None:
    subprocess.run(command, shell=True, check=True, capture_output=True, text=True)


PROGRAMS: dict[str, Callable[[str], None]] = {
    "cai": run_cai, "make": run_make, "python": run_python, "sbatch": run_sbatch,
    "cp": run_in_shell, "sed": run_in_shell, "tail": run_in_shell,
}  # fmt: skip


def run(command: str) -> None:
    """Runs one documented line. Raises AssertionError where it fails or where nothing says how it is run."""
    if match := re.fullmatch(r'eval "\$\((.*)\)"', command):
        command = match[1]
    if match := re.fullmatch(r"nohup (.*?) > \S+ 2>&1 &", command):
        command = match[1]
    if command.startswith("cai completion"):
        command = command.partition(" > ")[0]
    if command.startswith("{"):  # a row of a file, beside the command that reads it
        json.loads(command)
        return
    if any(re.match(pattern, command) for pattern in NOT_RUN):
        return
    command = re.sub(r"^([A-Z_]+=\S+ )+", "", command)
    program = command.split()[0]
    assert program in PROGRAMS, f"{command}: neither PROGRAMS nor NOT_RUN says how this is run"
    PROGRAMS[program](command)


already_run: set[tuple[str, ...]] = set()


@pytest.mark.parametrize("block", BLOCKS, ids=[block.source for block in BLOCKS])
def test_documented_commands_run(block, prepared, tmp_path, monkeypatch):
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder, copy_function=copy_file)
    monkeypatch.chdir(folder)
    changes: list[str] = []
    for command in block.commands:
        if STATEFUL.match(command):
            changes.append(command)
        if (*changes, command) not in already_run or STATEFUL.match(command):
            run(command)
            already_run.add((*changes, command))


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_commands_that_a_page_names_exist(page):
    for place, mention in documented_commands.page_mentions(page):
        if mention.startswith("make "):
            run_make(mention)
            continue
        if "COMMAND" in mention:
            continue
        path, command, rest = documented_commands.resolved(shlex.split(mention))
        for word in rest:
            if word.startswith("--"):
                assert word in documented_commands.option_names(command), f"{place}: {path} has no option {word}"


def test_shown_prompts_and_prompt_sets_are_valid(tmp_path):
    columns = Columns()
    fences = [
        fence for page in PAGES for fence in re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text("utf-8"), FENCES)
    ]
    rows = [json.loads(line) for kind, text in fences if kind == "json" for line in text.splitlines()]
    assert [row_messages(Row("page", row), columns)[-1]["role"] for row in rows] == ["user"] * len(rows) != []
    recipes = [yaml.safe_load(text) for kind, text in fences if kind == "yaml"]
    prompt_sets = [entry for recipe in recipes if "prompts" in recipe for entry in recipe["prompts"].values()]
    assert [PromptSet.model_validate(entry).source for entry in prompt_sets] != []
    (tmp_path / "page.csv").write_text(
        next(text for kind, text in fences if text.startswith("question,topic")), "utf-8"
    )
    prompts = read_prompt_set(PromptSet(source="page.csv", columns={"prompt": "question", "tags": "topic"}), tmp_path)
    assert [prompt["tags"] for prompt in prompts.prompts] == [["helpful", "topic:cards"]]


def test_every_command_stands_on_the_page_of_commands():
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    leaves = [path for path, command in documented_commands.command_tree() if not hasattr(command, "commands")]
    assert [path for path in leaves if f"`{path}`" not in page] == []


def test_every_treatment_is_for_a_command_that_is_documented():
    commands = [command for block in BLOCKS for command in block.commands]
    used = {treatment(command).pattern for command in commands}
    assert {entry.pattern for entry in TREATMENTS} - used == set()
    assert [pattern for pattern in NOT_RUN if not any(re.match(pattern, command) for command in commands)] == []


@pytest.mark.parametrize(
    "command",
    [
        "cai run quickstart --no-such-option", "cai no-such-command", "cai status no-such-run", "curl example.org",
        "make no-such-target", "python benchmarks/no_such.py",
    ],
)  # fmt: skip
def test_a_command_that_is_wrong_is_noticed(command, prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    with pytest.raises((AssertionError, ValueError, OSError)):
        run(command)


def test_a_command_in_a_fenced_block_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(documented_commands, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("Text:\n\n```\ncai run quickstart\n```\n")
    with pytest.raises(ValueError, match=r"page.md:4: a command in a fenced block"):
        list(documented_commands.page_blocks(page))


def row_names(output: str) -> list[str]:
    """The names that lines begin with: headers and rows as they are, without figures, folders and rules.

    Which verdicts, and which responses that were left out, are reported depends on the run.
    """
    names = []
    output = re.sub(
        r"(% with 95 % interval);.*?is\s+better", r"\1", output, flags=re.DOTALL
    )  # wrapped by the table's width
    for line in output.strip().splitlines():
        name = re.split(r"\s{2,}|\d", line.strip())[0].strip()
        if name and not set(name) <= set("─") and not re.match(r"[\w.-]+: .* left out", line):
            names.append(name)
    return names


def test_the_sample_output_in_the_readme_is_what_a_run_prints(prepared):
    sample = make_sample_output.sample_output((ROOT / "README.md").read_text(encoding="utf-8"))
    printed = make_sample_output.shown((prepared / "quickstart.out").read_text(encoding="utf-8"), Path("runs"))
    assert row_names(sample) == row_names(printed)
    assert len(row_names(sample)) > 30


def test_the_sample_output_is_replaced_between_its_markers(prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared / "runs", tmp_path / "runs", copy_function=copy_file)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    monkeypatch.setattr(make_sample_output, "README", tmp_path / "README.md")
    monkeypatch.setattr(make_sample_output, "PICTURE", tmp_path / "quickstart.svg")
    monkeypatch.setattr(make_sample_output, "_cai", lambda words: cai(words).stdout)
    monkeypatch.setattr("sys.argv", ["make_sample_output.py", str(tmp_path / "runs" / "quickstart")])
    make_sample_output.main()
    written = (tmp_path / "README.md").read_text(encoding="utf-8")
    printed = make_sample_output.shown((prepared / "quickstart.out").read_text(encoding="utf-8"), Path("runs"))
    assert make_sample_output.sample_output(written).strip() == printed
    assert "</svg>" in (tmp_path / "quickstart.svg").read_text(encoding="utf-8")
    assert written.partition(make_sample_output.BEGIN)[0] == readme.partition(make_sample_output.BEGIN)[0]
    assert written.partition(make_sample_output.END)[2] == readme.partition(make_sample_output.END)[2]
