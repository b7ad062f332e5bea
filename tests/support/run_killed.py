"""Runs a recipe in two folders: undisturbed, and killed with SIGKILL once in every stage.

Prints the digests of all stages' outputs, as JSON: {"undisturbed": {stage: digest}, "killed": {stage: digest}}.
A script, because it forks after the imports that take longest and before anything that starts threads.

    python tests/support/run_killed.py RECIPE UNDISTURBED KILLED
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot  # noqa: F401
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

import cai.engines.local.local_engine
import cai.report.page
import cai.training.loop  # noqa: F401
from cai.contracts.profile import load_profile
from cai.contracts.training_config import TrainingConfig
from cai.models import saving
from cai.run import pipeline, plan
from cai.run.recipe import Recipe, load_recipe
from cai.storage import journal, run_folder
from cai.storage.journal import Journal, Portion, Result
from cai.text.progress import PlainDisplay


def run(recipe: Recipe, folder: Path) -> None:
    pipeline.run_recipe(recipe, load_profile("cpu"), folder, plan.Options(), PlainDisplay())


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_stage(recipe: Recipe, stage: str) -> None:
    """Makes this process die in the middle of a stage: half a line into its journal, or with its model half saved."""
    if isinstance(recipe.stages[stage], TrainingConfig):
        save = saving.save_model

        @functools.wraps(save)
        def save_and_die(folder: Path, *args: object, **options: object) -> None:
            save(folder, *args, **options)  # type: ignore[arg-type]
            if folder.parent.name.startswith(f"{stage}-"):
                (folder / "model.safetensors").write_bytes(b"torn")
                die()

        saving.save_model = save_and_die
        return
    append = Journal.append

    def append_half(self: Journal, portion: Portion, results: Sequence[Result]) -> None:
        if self.folder.name.startswith(f"{stage}-") and portion.number > 0:
            with self.path.open("ab") as file:
                file.write(journal._line(portion.positions, results)[:-9])
            die()
        append(self, portion, results)

    Journal.append = append_half  # type: ignore[method-assign]
    # A stage without a second portion dies just before it is marked as done.
    mark_done = run_folder.mark_done

    def mark_done_or_die(folder: Path, outputs: run_folder.Outputs) -> run_folder.Finished:
        if folder.name.startswith(f"{stage}-"):
            die()
        return mark_done(folder, outputs)

    run_folder.mark_done = mark_done_or_die


def main(recipe: Recipe, undisturbed: Path, killed: Path) -> None:
    for stage in recipe.stages:
        child = os.fork()
        if not child:
            die_in_stage(recipe, stage)
            run(recipe, killed)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.WTERMSIG(status) == signal.SIGKILL, f"{stage} was not killed"
        assert stage not in run_folder.latest(killed), f"{stage} counts as done"
    run(recipe, killed)
    run(recipe, undisturbed)
    digests = {
        name: {stage: run_folder.finished(path).digest for stage, path in run_folder.latest(folder).items()}
        for name, folder in (("undisturbed", undisturbed), ("killed", killed))
    }
    print(json.dumps(digests))


if __name__ == "__main__":
    main(load_recipe(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
