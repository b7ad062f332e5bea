"""Compares checkpoints: each answers the same held-out prompts, and a judge compares every two answers.

This stage is made of others. Every checkpoint has a `sample` stage of its own, under seeds that all of them share, so
that equal models give equal texts; every checkpoint but the first has a `judge` stage, in which its responses are
compared with those of the checkpoints before it, by every applicable principle in both orders (Zheng et al. 2023, arXiv
2306.05685, on position bias); and a `comparison` stage turns both into figures and a page. So another checkpoint costs
its own responses and pairs, another judge samples nothing, and a changed weight recomputes the figures alone.

Left out: several judges, human annotation, and a checkpoint as its own judge: `judge: self` means the recipe's model
here, for all checkpoints alike. A judge that is related to one checkpoint may favour it; name another where that
matters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from cai.contracts.references import CheckpointRef, ModelReference, OneOrMore, OutputKind, PrincipleRef, PromptSetRef
from cai.contracts.stage_config import CompositeConfig, PrincipleField, WritingConfig
from cai.storage.rows import stable_id


class Config(CompositeConfig, WritingConfig):
    gives: ClassVar[OutputKind] = "comparison"

    kind: Literal["compare"] = "compare"
    models: dict[str, CheckpointRef] = Field(
        min_length=1, description="Models or stages, by the name they get in the figures; `model` = the recipe's."
    )
    prompts: OneOrMore[PromptSetRef] = Field(
        min_length=1, description="Prompt sets; figures are given for each, the first one first."
    )
    n: int = Field(1, ge=1, description="Responses of each checkpoint to each prompt.")
    baseline: str | None = Field(None, description="What the others are compared to; absent = the first model.")
    pairs: Literal["all", "baseline"] = Field("all", description="Head to head: all pairs, or each with the baseline.")
    judged: int | None = Field(None, ge=1, description="Prompts of each set judged head to head; absent = all.")
    judge: Annotated[str, ModelReference(("policy",), absent="judge", self_is="model")] | None = Field(
        None, description="Model or stage that judges; absent = the recipe's judge."
    )
    principles: list[PrincipleRef] | Literal["all"] = Field(
        "all", description="Ids or tags of the principles that are asked about."
    )
    tie_below: float = Field(0.1, ge=0, description="Log-odds (nats) under which a comparison is a tie.")
    min_option_probability: float = Field(
        0.1, ge=0, le=1, description="Probability the options must hold; less is a failure."
    )
    pair_batch: int | None = Field(
        None, ge=1, description="Pairs that are judged and written together; absent = as for `journal_batch`."
    )
    examples: int = Field(12, ge=0, description="Prompts whose responses the page shows side by side.")

    @field_validator("models")
    @classmethod
    def _plain_names(cls, models: dict[str, str]) -> dict[str, str]:
        for name in models:
            if not name or len(name) > 40 or not name.isprintable():
                raise ValueError(f"found the name {name[:40]!r}, expected 1 to 40 printable characters")
        return models

    @model_validator(mode="after")
    def _baseline_is_compared(self) -> Self:
        if self.baseline is not None and self.baseline not in self.models:
            raise ValueError(f"found the baseline {self.baseline!r}, expected one of {', '.join(self.models)}")
        return self

    def principle_fields(self) -> tuple[PrincipleField, ...]:
        return ("compare", "weight")

    def parts(self) -> list[Mapping[str, Any]]:
        """A `sample` stage for each checkpoint, a `judge` stage for each but the baseline, and the figures."""
        baseline = self.baseline or next(iter(self.models))
        names = [baseline, *(name for name in self.models if name != baseline)]
        responses = {name: self.part_id(_folder_name(name)) for name in names}
        votes = {name: self.part_id(_folder_name(name), "votes") for name in names[1:]}
        sampling = self._fields("max_new_tokens", "temperature", "top_p", "top_k", "stop")
        shared = self._fields("prompts", "n", "retries", "journal_batch") | {"seeds": self.id}
        stages: list[Mapping[str, Any]] = [
            {"id": responses[name], "kind": "sample", "model": self.models[name], **shared, **sampling}
            for name in names
        ]
        for index, name in enumerate(names[1:], 1):
            others = names[:index] if self.pairs == "all" else names[:1]
            compared = [responses[name], *(responses[other] for other in others)]
            judge = self._fields("prompts", "judge", "principles", "min_option_probability", "retries")
            judge |= {"n_prompts": self.judged, "journal_batch": self.pair_batch}
            stages.append({"id": votes[name], "kind": "judge", "from": compared, "pairs": "against", **judge})
        figures = self._fields("judge", "prompts", "n", "pairs", "judged", "principles", "tie_below", "examples")
        figures |= {"models": {name: self.models[name] for name in names}}
        figures |= {"sampling": self._fields("temperature", "top_p", "top_k", "max_new_tokens")}
        rows = {"responses": responses, "votes": list(votes.values())}
        return [*stages, {"id": self.id, "kind": "comparison", **rows, **figures}]

    def _fields(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}


def _folder_name(name: str) -> str:
    """A checkpoint's name as a part of a folder's name, still unlike any other's."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    return plain if plain == name else f"{plain}-{stable_id(name)[:6]}"
