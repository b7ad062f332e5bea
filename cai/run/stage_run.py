"""One stage at work: what it is given, and the state in which its function is called."""

from __future__ import annotations

import gc
import os
import platform
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cai import engines
from cai.contracts.context import Context, OpenEngine
from cai.contracts.profile import Profile
from cai.contracts.references import failures_read
from cai.contracts.stage_config import StageConfig
from cai.contracts.training_config import TrainingConfig
from cai.run.plan import Planner, Step, library_versions
from cai.run.recipe_names import inputs_of, models_of, needs, prompt_sets_of
from cai.run.stage_progress import FINISHED_BEFORE
from cai.stages import run_function
from cai.storage import run_folder
from cai.storage.journal import Journal, count_items
from cai.storage.rows import stable_seed
from cai.text.progress import StageLine


@dataclass(frozen=True)
class StageRun:
    """A stage that is about to run: what, on which outputs of others, and where."""

    planner: Planner
    step: Step
    done: Mapping[str, run_folder.Finished]
    profile: Profile
    report_to: tuple[str, ...] = ()
    """Trackers that trainers report to."""

    @property
    def config(self) -> StageConfig:
        """The stage's config, resolved."""
        return self.step.config

    @property
    def folder(self) -> Path:
        """The stage's folder."""
        assert self.step.folder is not None, "all that the stage needs is done"
        return self.step.folder

    @property
    def trains(self) -> bool:
        """Whether the stage trains a model."""
        return isinstance(self.config, TrainingConfig)

    def facts(self) -> dict[str, Any]:
        """What is known of a stage before it runs: the beginning of its stage.json."""
        inputs = {name: self.done[name] for name in needs(self.config, self.done)}
        return {
            "id": self.config.id,
            "kind": self.config.kind,
            "gives": self.config.gives,
            "config": self.config.model_dump(mode="json", by_alias=True),
            "seed": self.planner.recipe.seed,
            "inputs": {
                name: {"folder": finished.folder.name, "digest": finished.digest} for name, finished in inputs.items()
            },
            "parts": self.step.parts,
            "profile": self.profile.model_dump(mode="json"),
            "versions": library_versions(),
            "host": {"machine": platform.machine(), "system": platform.platform(), "cores": os.cpu_count()},
            "earlier": [str(earlier.folder.relative_to(self.planner.run)) for earlier in self.step.earlier],
            "began": now(),
            FINISHED_BEFORE: count.n_finished if (count := count_items(self.folder)) else 0,
        }

    def work(self, line: StageLine, journal: Journal, open_engine: OpenEngine | None = None) -> dict[str, Any]:
        """Calls the stage's function, in this process, with the random state that a fresh one has; its figures.

        `open_engine` gives the engines of its models; absent = those that the profile names.
        """
        config, recipe = self.config, self.planner.recipe
        context = Context(
            stage_id=config.id,
            folder=self.folder,
            seed=recipe.seed,
            profile=self.profile,
            progress=line,
            journal=journal,
            constitution=recipe.constitution,
            inputs={name: self.done[name].folder for name in inputs_of(config)},
            prompt_sets={name: self.planner.fingerprints.prompts(name) for name in prompt_sets_of(config)},
            models={
                "": recipe.models[recipe.model],
                **{name: self.planner.fingerprints.model(name, self.done) for name in models_of(config)},
            },
            open_engine=open_engine or engines.open_engine,
            report_to=self.report_to,
            home=recipe.folder,
            failures_read=failures_read(config),
            earlier=self.step.earlier,
        )
        _reset_randomness(stable_seed(recipe.seed, config.id, "stage") % 2**32, self.trains)
        try:
            figures = run_function(config.kind)(config, context)
            return figures | {"left_out": {config.id: context.left_out}} if context.left_out else figures
        finally:
            if self.trains:
                gc.collect()  # a trainer and its model refer to each other; both go before the next model is loaded


def prepare(profile: Profile) -> None:
    """Sets what libraries read when they are first imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not profile.uses_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed, where installed, warns that it had to guess
    elif os.environ.get("DS_ACCELERATOR") == "cpu":  # an earlier run of this process, on the CPU
        del os.environ["DS_ACCELERATOR"]
    if profile.offline:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if profile.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(profile.threads)
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(profile.threads)


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _reset_randomness(seed: int, training: bool) -> None:
    """Every stage begins with the same global random state, whichever stages ran before it in this process."""
    random.seed(seed)
    if "numpy" in sys.modules or training:
        import numpy

        numpy.random.seed(seed)
    if "torch" in sys.modules or training:
        import torch

        torch.manual_seed(seed)
