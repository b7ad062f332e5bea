"""summary.json: the figures of all stages of a run that are done, merged by key.

This module defines the file: its type, how it is put together, and its JSON Schema (`summary.schema.json` beside it,
which a test holds against real summaries). The figures themselves are defined in `cai.report.figure_types`.

    python -m cai.report.summary > cai/report/summary.schema.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, cast

from pydantic import ConfigDict, TypeAdapter, with_config
from pydantic.json_schema import GenerateJsonSchema
from typing_extensions import TypedDict

from cai.report.figure_types import (
    BestOfNFigures,
    CheckpointFigures,
    GateFigures,
    HeadToHead,
    LabelFigures,
    PromptSetFigures,
    RateFigure,
    RevisionFigures,
    RewardFigures,
    SampleFigures,
    TrainingFigures,
    VoteFigures,
)
from cai.storage.run_folder import Finished


@with_config(ConfigDict(extra="forbid", use_attribute_docstrings=True))
class Summary(TypedDict):
    """What a run has measured. Further prompt sets of a comparison add `checkpoints_<set>` and `head_to_head_<set>`."""

    recipe: str
    run: str
    """The run's folder."""
    stages: dict[str, str]
    """Stage to its folder in the run's."""
    seconds: dict[str, float | None]
    """Stage to how long it ran."""
    failures: dict[str, int]
    """Stage to the number of its items without a result."""
    samples: NotRequired[dict[str, SampleFigures]]
    revisions: NotRequired[dict[str, RevisionFigures]]
    votes: NotRequired[dict[str, VoteFigures]]
    training: NotRequired[dict[str, TrainingFigures]]
    best_of_n: NotRequired[dict[str, BestOfNFigures]]
    gate: NotRequired[dict[str, GateFigures]]
    """Stage to its figures, for each of the kinds above."""
    labels: NotRequired[LabelFigures]
    """Of the last prefer stage."""
    reward: NotRequired[RewardFigures]
    """Of the last reward stage."""
    checkpoints: NotRequired[dict[str, CheckpointFigures]]
    """Checkpoint to its figures on a prompt set of the comparison: on the first one where the key does not name it."""
    head_to_head: NotRequired[list[HeadToHead]]


def summary_of(recipe_name: str, run: Path, finished_stages: Mapping[str, Finished]) -> Summary:
    """The summary of the stages, by id, that are done. Where two have figures of one name, the later stage's stand."""
    summary: dict[str, Any] = {"recipe": recipe_name, "run": str(run), "stages": {}, "seconds": {}, "failures": {}}
    for stage_id, stage in finished_stages.items():
        facts = stage.facts
        _merge(summary, facts.get("figures", {}))
        summary["stages"][stage_id] = stage.folder.name
        summary["seconds"][stage_id] = facts.get("seconds")
        summary["failures"][stage_id] = facts.get("failures", 0)
    return cast(Summary, summary)


def _merge(summary: dict[str, Any], figures: Mapping[str, Any]) -> None:
    """Puts the figures into the summary; nested mappings are merged, everything else is replaced."""
    for name, figure in figures.items():
        if isinstance(figure, Mapping):
            present = summary.get(name)
            summary[name] = dict(present) if isinstance(present, Mapping) else {}
            _merge(summary[name], figure)
        else:
            summary[name] = figure


class ComparedSet(NamedTuple):
    """A comparison's figures on one prompt set, as a summary has them."""

    prompt_set: str
    """Empty for the first prompt set, which a summary does not name."""
    rates: dict[str, dict[str, RateFigure]]
    """Checkpoint to its rates, in the order of `cai.report.figures.METRICS`."""
    head_to_head: list[HeadToHead]


def comparison_summary(figures_by_set: Mapping[str, PromptSetFigures]) -> dict[str, Any]:
    """A comparison's part of the summary, from its figures by prompt set."""
    summary: dict[str, Any] = {}
    for index, (prompt_set, figures) in enumerate(figures_by_set.items()):
        suffix = f"_{prompt_set}" if index else ""
        summary[f"checkpoints{suffix}"] = {
            checkpoint: rates | {"behaviours": figures["behaviours"][checkpoint]}
            for checkpoint, rates in figures["checkpoints"].items()
        }
        summary[f"head_to_head{suffix}"] = figures["head_to_head"]
    return summary


def compared_sets(summary: Mapping[str, Any]) -> list[ComparedSet]:
    """The opposite of `comparison_summary`: the comparison's figures on each prompt set; empty without a comparison."""
    compared = []
    for key, checkpoints in summary.items():
        if key == "checkpoints" or key.startswith("checkpoints_"):
            suffix = key.removeprefix("checkpoints")
            rates = {
                checkpoint: {name: rate for name, rate in figures.items() if name != "behaviours"}
                for checkpoint, figures in checkpoints.items()
            }
            compared.append(ComparedSet(suffix.removeprefix("_"), rates, summary.get(f"head_to_head{suffix}", [])))
    return compared


class _SchemaGenerator(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # a title would only repeat the field's name


def json_schema() -> dict[str, Any]:
    """The JSON Schema of summary.json."""
    schema = TypeAdapter(Summary).json_schema(schema_generator=_SchemaGenerator)
    # Keys that contain the name of a prompt set or of a reward have no place in a typed dictionary.
    properties = schema["properties"]
    schema["patternProperties"] = {f"^{name}_.": properties[name] for name in ("checkpoints", "head_to_head")}
    schema["$defs"]["TrainingFigures"]["patternProperties"] = {"^(reward|value)/": {"$ref": "#/$defs/FirstAndLast"}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
