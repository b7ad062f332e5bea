"""How many items of a feedback stage are computed and written as one portion, by the work that an item takes.

A kill loses the portions that are being computed (`cai.storage.journal`). With a large model on a CPU, as many items as
the profile lets in flight take many minutes, so that a portion has fewer there: those that take about
`PORTION_SECONDS`. The rule knows sizes and never a clock: a stage that was killed must cut its items as an undisturbed
one does, so that both end with the same bytes. Models of fewer than `SMALL_MODEL` parameters keep the profile's number,
which is chosen for them.

Left out: GPUs and servers, whose speed does not follow from a model's size; models that compute a token with a part of
their parameters, such as mixtures of experts, which get smaller portions than they need.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cai.contracts.context import Context
from cai.contracts.machine import usable_cores
from cai.contracts.model import Model
from cai.contracts.profile import Profile
from cai.contracts.stage_config import FeedbackConfig
from cai.models.reference import base_of, fetch
from cai.storage.rows import Message
from cai.text.errors import BadInput

PORTION_SECONDS = 45.0
"""A kill should cost a minute at most; the rest of it is for machines that are slower than the rates below."""
MIN_ITEMS = 16
"""With fewer rows a decode step takes hardly less time, so that the stage as a whole would take much longer."""
SMALL_MODEL = 20_000_000
"""Parameters."""
SAMPLED_PER_SECOND = 15e9
"""Parameters times tokens that a core samples in a second. Measured on two quiet cores with 135 million parameters in
bfloat16: 15e9 with 64 rows, 24e9 with 256."""
READ_PER_SECOND = 60e9
"""The same for tokens of prompts. Measured: 78e9."""
BYTES_PER_TOKEN = 4
"""Of English text, with the vocabularies of today's models."""
REQUEST_TOKENS = 64
"""About what a template and a principle add to a conversation."""


class Work(NamedTuple):
    """What a model does for an average item, in tokens: at most `sampled`, and about `read` of prompts."""

    model: Model
    sampled: float = 0.0
    read: float = 0.0


def limit_portions(config: FeedbackConfig, context: Context, n_items: int, *work: Work) -> int | None:
    """Most items that a portion of the stage may have; None where its config or the profile's number alone decides.

    Tells the user where it is smaller than the profile's.
    """
    profile = context.profile
    limit = items_per_portion(profile, work) if config.journal_batch is None else None
    if limit is not None and limit < min(profile.items_in_flight, n_items):
        at_risk = "about a minute of work, which is what a kill loses"
        context.progress.note(
            f"{limit:,} items a portion, where the profile allows {profile.items_in_flight:,}: {at_risk}"
        )
    return limit


def items_per_portion(profile: Profile, work: Sequence[Work]) -> int | None:
    """Items that take about `PORTION_SECONDS`, at least `MIN_ITEMS`; None where no limit is needed."""
    if profile.uses_gpu or profile.engine == "server":
        return None
    core_seconds = 0.0
    for model, sampled, read in work:
        n_parameters = 0 if model.served else count_stored_parameters(model)
        if n_parameters >= SMALL_MODEL:
            core_seconds += n_parameters * (sampled / SAMPLED_PER_SECOND + read / READ_PER_SECOND)
    if not core_seconds:
        return None
    cores = profile.threads or max(1, usable_cores() // profile.processes_here)
    return max(MIN_ITEMS, math.floor(PORTION_SECONDS * cores / core_seconds))


def count_stored_parameters(model: Model) -> int:
    """Parameters in a model's safetensors files, an adapter's base included, from their headers; 0 where unreadable."""
    try:
        folder = fetch(model)
        base = base_of(model, folder)
        n_parameters = sum(map(_count_in_file, sorted(folder.glob("*.safetensors"))))
    except (OSError, ValueError, BadInput):  # loading the model tells the user why
        return 0
    return n_parameters + (0 if base is None else count_stored_parameters(base))


def _count_in_file(path: Path) -> int:
    """A safetensors file begins with 8 bytes, the length of its header, and the header: a shape by tensor name."""
    with path.open("rb") as file:
        n_bytes = int.from_bytes(file.read(8), "little")
        if n_bytes > path.stat().st_size:
            raise ValueError(f"{path.name} is cut off")
        header = json.loads(file.read(n_bytes))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def mean_tokens(conversations: Sequence[tuple[Sequence[Message], Sequence[str]]]) -> float:
    """About how many tokens conversations have in the mean, further texts included."""
    n_bytes = 0
    for messages, texts in conversations:
        n_bytes += sum(len(message["content"].encode()) for message in messages)
        n_bytes += sum(len(text.encode()) for text in texts)
    return n_bytes / BYTES_PER_TOKEN / max(1, len(conversations))
