"""Shipped recipes and profiles load from any folder: by name, as a copy, and from an installed package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import toy_stages
from click.testing import CliRunner

import cai
from cai.cli import main
from cai.contracts.profile import load_profile
from cai.document.shipped import shipped_folder, shipped_names
from cai.run.recipe import load_recipe

PROFILES, RECIPES = shipped_names("configs"), shipped_names("recipes")
LOAD_ALL = """
import json
from cai.contracts.profile import load_profile
from cai.document.shipped import shipped_folder, shipped_names
from cai.run.recipe import load_recipe
folders = {folder: str(shipped_folder(folder)) for folder in ("recipes", "constitutions", "configs")}
recipes = {name: str(load_recipe(name).constitution.path) for name in shipped_names("recipes")}
profiles = {name: load_profile(name).model_dump(mode="json") for name in shipped_names("configs")}
print(json.dumps({"folders": folders, "recipes": recipes, "profiles": profiles}))
"""
"""Loads every shipped document by name and prints the folders and files that they were found in."""


@pytest.fixture
def foreign_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory far from the package."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_loads_by_name_and_as_a_copy_with_the_same_files(name, foreign_folder):
    copy = shutil.copy(shipped_folder("configs") / f"{name}.yaml", foreign_folder / "mine.yaml")
    profile = load_profile(name)
    assert load_profile(copy.name) == profile
    for file in (profile.accelerate, *profile.launcher):
        assert file is None or "/" not in str(file) or Path(file).is_file()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_loads_by_name_and_as_a_copy_with_the_same_constitution(name, foreign_folder):
    copy = shutil.copy(shipped_folder("recipes") / f"{name}.yaml", foreign_folder / "mine.yaml")
    shipped, copied = load_recipe(name), load_recipe(copy.name)
    assert copied.stages == shipped.stages
    assert copied.constitution is not None
    assert copied.constitution == shipped.constitution


def test_a_copied_recipe_that_uses_the_shipped_constitution_says_so_before_anything_runs(foreign_folder):
    copy = shutil.copy(shipped_folder("recipes") / "quickstart.yaml", foreign_folder / "mine.yaml")
    constitution = load_recipe("quickstart").constitution
    note = f"constitution: {constitution.path}, the shipped one; there is none beside mine.yaml\n"
    dry_run = CliRunner().invoke(main, ["run", copy.name, "--dry-run", "--json"])
    assert dry_run.exit_code == 0, dry_run.output
    assert dry_run.stderr == note
    assert json.loads(dry_run.stdout)["stages"]
    beside = foreign_folder / "constitutions" / constitution.path.name
    beside.parent.mkdir()
    shutil.copy(constitution.path, beside)
    copy.write_text(copy.read_text().replace("../constitutions/", "constitutions/"))
    assert load_recipe(copy).notes == load_recipe("quickstart").notes == ()


def test_a_run_says_first_that_it_uses_the_shipped_constitution(foreign_folder, monkeypatch):
    toy_stages.install(monkeypatch)
    toy_stages.make_recipe(foreign_folder)
    shipped = shipped_folder("constitutions") / "micro.yaml"
    setting = f"constitution=../constitutions/{shipped.name}"
    result = CliRunner().invoke(main, ["run", "recipe.yaml", "--set", setting, "--until", "texts"])
    assert result.exit_code == 0, result.output
    first_line = result.stderr.splitlines()[0]
    assert first_line == f"constitution: {shipped}, the shipped one; there is none beside recipe.yaml"


def test_a_word_of_a_launcher_is_no_shipped_file_unless_it_names_a_folder(foreign_folder):
    profile = (shipped_folder("configs") / "2x8gpu-zero3.yaml").read_text()
    launcher = "launcher: [bash, multi-node/on-each.sh, cpu.yaml]"
    text = re.sub(r"^launcher:.*$", launcher, profile, count=1, flags=re.MULTILINE)
    assert launcher in text
    Path("mine.yaml").write_text(text)
    on_each = (shipped_folder("configs") / "multi-node" / "on-each.sh").resolve()
    assert load_profile("mine.yaml").launcher == ("bash", str(on_each), "cpu.yaml")


def test_the_launcher_over_ssh_that_a_copied_profile_switches_to_is_found(foreign_folder):
    lines = (shipped_folder("configs") / "2x8gpu-zero3.yaml").read_text().splitlines()
    text = "\n".join(line.removeprefix("# ") if line.startswith("# launcher:") else line for line in lines)
    Path("mine.yaml").write_text(text.replace("launcher: [srun", "# launcher: [srun"))
    Path("hosts.txt").write_text("localhost\nother\n")
    on_each = (shipped_folder("configs") / "multi-node" / "on-each.sh").resolve()
    assert load_profile("mine.yaml").launcher == ("bash", str(on_each), str(Path("hosts.txt").resolve()))


def test_a_file_beside_a_copied_profile_precedes_the_shipped_one(foreign_folder):
    shutil.copy(shipped_folder("configs") / "8gpu-zero3.yaml", foreign_folder)
    mine = foreign_folder / "accelerate" / "8gpu-zero3.yaml"
    mine.parent.mkdir()
    shutil.copy(shipped_folder("configs") / "accelerate" / "8gpu-zero3.yaml", mine)
    assert load_profile("8gpu-zero3.yaml").accelerate == mine.resolve()


def test_all_load_by_name_from_a_package_that_holds_them_as_a_wheel_does(foreign_folder):
    package = Path(cai.__file__).parent
    installed = foreign_folder / "site-packages" / "cai"
    shutil.copytree(package, installed, ignore=shutil.ignore_patterns("__pycache__", "weights"))
    (installed / "micro_model" / "weights").symlink_to(package / "micro_model" / "weights")
    for folder in ("recipes", "constitutions", "configs"):
        shutil.copytree(shipped_folder(folder), installed / folder)
    environment = {**os.environ, "PYTHONPATH": str(installed.parent)}
    process = subprocess.run([sys.executable, "-c", LOAD_ALL], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    loaded = json.loads(process.stdout)
    assert (list(loaded["recipes"]), list(loaded["profiles"])) == (RECIPES, PROFILES)
    for path in [*loaded["folders"].values(), *loaded["recipes"].values()]:
        assert Path(path).is_relative_to(installed)
    for profile in loaded["profiles"].values():
        assert profile["accelerate"] is None or Path(profile["accelerate"]).is_relative_to(installed)


def test_the_slurm_script_hands_its_cpus_to_srun_and_its_arguments_to_cai(foreign_folder):
    """With a stand-in for `cai` on the path, which prints what it was started with."""
    script = shipped_folder("configs") / "multi-node" / "2x8gpu-zero3.sbatch"
    options = [line.split()[1] for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--requeue", "--cpus-per-task=64", "--signal=B:TERM@600"} <= set(options)
    stand_in = foreign_folder / "cai"
    stand_in.write_text('#!/bin/bash\necho "$SRUN_CPUS_PER_TASK" "$@"\n')
    stand_in.chmod(0o755)
    environment = os.environ | {"PATH": f"{foreign_folder}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "64"}
    process = subprocess.run(
        ["bash", str(script), "mine.yaml", "--online"], env=environment, capture_output=True, text=True, check=True
    )
    assert process.stdout == "64 run --on 2x8gpu-zero3 mine.yaml --online\n"
