"""What a stage function receives: folder, inputs, prompts, models and seed, every name of the recipe resolved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai.contracts.earlier import Earlier
from cai.contracts.references import FailuresRead
from cai.contracts.writing_stages import writing_stages
from cai.storage.journal import RECORDS, Journal, read_failures
from cai.storage.rows import Failure, Prompt, read_rows, stable_seed
from cai.templates import TemplateSet, load_templates
from cai.text.left_out import LeftOut, cut_off_reason, left_out_sentence
from cai.text.progress import Progress

if TYPE_CHECKING:
    from cai.constitution import Constitution
    from cai.contracts.engine import Engine
    from cai.contracts.model import Model
    from cai.contracts.profile import Profile


OpenEngine = Callable[["Model", "Profile"], AbstractContextManager["Engine"]]
"""Gives the engine that a model answers with on a profile."""


@dataclass(frozen=True)
class Context:
    """What a stage is given to work with, all names of the recipe resolved."""

    stage_id: str
    folder: Path
    seed: int
    profile: Profile
    progress: Progress
    journal: Journal
    constitution: Constitution | None
    inputs: Mapping[str, Path]
    """Folder of each stage that this one reads."""
    prompt_sets: Mapping[str, list[Prompt]]
    models: Mapping[str, Model]
    """Every model this stage uses, by the name the config gives it; `""` is the recipe's own."""
    open_engine: OpenEngine
    report_to: tuple[str, ...] = ()
    home: Path = Path()
    """The recipe's folder, from which relative paths start."""
    failures_read: Mapping[str, FailuresRead | None] = field(default_factory=dict)
    """What the config declares to read of the failures of each input stage (`cai.contracts.references`)."""
    earlier: Sequence[Earlier] = ()
    """Folders of this stage from which unchanged items are taken over, the newest first."""
    left_out: list[str] = field(default_factory=list)
    """What `report_left_out` has told the user, for the end of the run."""

    def rows(self, stages: str | Iterable[str]) -> list[Any]:
        """The records of one or several input stages, in the order named."""
        names = [stages] if isinstance(stages, str) else stages
        return [row for name in names for row in read_rows(self.inputs[name] / RECORDS)]

    def prompts(self, sets: Sequence[str]) -> list[Prompt]:
        """The prompts of the named sets, in order. One that is in several comes once, with the tags of all of them."""
        by_id: dict[str, Prompt] = {}
        for prompt in (prompt for name in sets for prompt in self.prompt_sets[name]):
            if earlier := by_id.get(prompt["id"]):
                prompt = {**earlier, "tags": list(dict.fromkeys([*earlier["tags"], *prompt["tags"]]))}
            by_id[prompt["id"]] = prompt
        return list(by_id.values())

    def chosen_prompts(self, sets: Sequence[str], n: int | None) -> set[str]:
        """Ids of the prompts of the named sets: all, or `n` of each set, chosen by seed."""
        chosen: set[str] = set()
        for name in sets:
            ids = [prompt["id"] for prompt in self.prompts([name])]
            chosen.update(sorted(ids, key=lambda prompt_id: stable_seed(self.seed, "judged", prompt_id))[:n])
        return chosen

    def failures(self, stage: str) -> list[Failure]:
        """What failed in an input stage. Its reference must say `failures="reasons"`."""
        self._require_declared(stage, ("reasons",))
        return [Failure.from_json(failure) for failure in read_failures(self.inputs[stage])]

    def failed_ids(self, stage: str) -> set[str]:
        """The items that failed in an input stage. Its reference must say what is read of failures."""
        self._require_declared(stage, ("ids", "reasons"))
        return {failure["id"] for failure in read_failures(self.inputs[stage])}

    def _require_declared(self, stage: str, readings: tuple[FailuresRead, ...]) -> None:
        """Raises AssertionError where failures are read that are no part of the stage's fingerprint."""
        if self.failures_read.get(stage) not in readings:
            raise AssertionError(
                f"the config of stage {self.stage_id!r} must refer to {stage!r} with `failures={readings[0]!r}`"
            )

    def report_left_out(self, n_input: int, unit: str, reasons: Iterable[LeftOut]) -> None:
        """Tells the user where the stage leaves out more than a tenth of its input, and why."""
        if sentence := left_out_sentence(n_input, unit, reasons):
            self.left_out.append(sentence)
            self.progress.note(sentence)

    def cut_off_reason(self, n: int, rows_by_stage: Mapping[str, Iterable[Any]], other_remedy: str = "") -> LeftOut:
        """`n` responses that were cut off, from these input stages; `other_remedy` is what helps besides."""
        limits: dict[str, int | None] = {}
        for stage, rows in rows_by_stage.items():
            limits |= writing_stages(stage, self.inputs[stage], rows)
        return cut_off_reason(n, limits, other_remedy)

    def model(self, name: str | None) -> Model:
        """The model of that name in the recipe; the recipe's own for None."""
        return self.models[name or ""]

    def templates(self, name: str | None) -> TemplateSet:
        """The template set that goes with a model."""
        return load_templates(self.model(name).templates)

    def engine(self, name: str | None) -> AbstractContextManager[Engine]:
        """An engine for the model of that name; weights are loaded on first use."""
        return self.open_engine(self.model(name), self.profile)

    def seed_for(self, *parts: object) -> int:
        """The seed of one item of this stage, independent of when and with what it is computed."""
        return stable_seed(self.seed, self.stage_id, *parts)
