"""Everything a run has about one item: prompt, responses, critiques and revisions, votes, preference.

Reads the rows of finished feedback stages. All text comes from models and users: it is shown line by line, without
characters that could steer a terminal.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cai.feedback.label_sums import LabelSum, label_line, label_rules, label_sum
from cai.storage import run_folder
from cai.storage.files import read_json
from cai.storage.journal import RECORDS
from cai.storage.rows import read_rows
from cai.text.errors import BadInput
from cai.text.formatting import printable
from cai.text.tables import table

RowsByStage = dict[str, list[dict[str, Any]]]
"""Stage id to rows, in the order of the recipe."""


def find_item_rows(run: Path, item: str | None) -> RowsByStage:
    """The rows about one item: an id, or the unique beginning of one; a random prompt for None.

    A prompt's id gives everything about that prompt; a row's id gives the row and the rows that it is linked to. A row
    of votes gets the key `labels`: how the label of each `prefer` stage follows from the votes, as `LabelSum`.
    Raises BadInput for a run without rows, and for an id that none or several of them have.
    """
    rows_by_stage = _read_finished_stages(run)
    rules = label_rules(run)
    rows = [row for stage_rows in rows_by_stage.values() for row in stage_rows]
    if not rows:
        raise BadInput(f"{run}: no stage of this run has left rows yet")
    if item is None:
        item_id = random.choice(sorted({row["prompt_id"] for row in rows}))
    else:
        item_id = _complete_id({row_id for row in rows for row_id in (row["id"], row["prompt_id"])}, item, run)
    linked_ids = _linked_ids(rows, item_id)
    item_rows = {
        stage_id: [row for row in stage_rows if row["prompt_id"] == item_id or _row_ids(row) & linked_ids]
        for stage_id, stage_rows in rows_by_stage.items()
    }
    for stage_id, rules_by_stage in rules.items():
        for row in item_rows.get(stage_id, []):
            row["labels"] = [label_sum(prefer_stage, row, rule) for prefer_stage, rule in rules_by_stage.items()]
    return {stage_id: stage_rows for stage_id, stage_rows in item_rows.items() if stage_rows}


def item_lines(rows_by_stage: RowsByStage) -> Iterator[str]:
    """The rows about an item as a person reads them."""
    first_row = next(iter(rows_by_stage.values()))[0]
    yield f"prompt {first_row['prompt_id']}  {' '.join(printable(tag) for tag in first_row['tags'])}"
    for message in first_row["prompt"]:
        yield from _labelled_lines(f"  {message['role']}: ", message["content"])
    for stage_id, rows in rows_by_stage.items():
        for row in rows:
            yield ""
            yield from _row_lines(stage_id, row)


def _read_finished_stages(run: Path) -> RowsByStage:
    """The rows of every finished feedback stage."""
    latest = run_folder.latest(run)
    rows_by_stage: RowsByStage = {}
    for stage_id in (read_json(run / run_folder.RUN) or {"stages": []})["stages"]:
        folder = latest.get(stage_id)
        if folder is None or run_folder.finished(folder) is None:
            continue
        if (read_json(folder / run_folder.STAGE) or {}).get("gives") in {"texts", "votes", "preferences"}:
            rows_by_stage[stage_id] = read_rows(folder / RECORDS)
    return rows_by_stage


def _complete_id(ids: set[str], beginning: str, run: Path) -> str:
    """The id that is `beginning`, or the only one that begins with it."""
    if beginning in ids:
        return beginning
    matches = sorted(item_id for item_id in ids if item_id.startswith(beginning))
    if len(matches) == 1:
        return matches[0]
    if not matches:
        raise BadInput(
            printable(
                f"{run}: no prompt, response, pair or preference has an id that begins with "
                f"{beginning!r}; `cai show RUN --random` picks one"
            )
        )
    raise BadInput(
        printable(f"{run}: {len(matches)} ids begin with {beginning!r}: {', '.join(matches[:4])} ...; give more of it")
    )


def _linked_ids(rows: list[dict[str, Any]], item_id: str) -> set[str]:
    """Ids that belong to an item: its own, those of its revisions, its pairs and their responses."""
    linked_ids = {item_id}
    responses = {(row["prompt_id"], row["response"]) for row in rows if row["id"] == item_id and "response" in row}
    for row in rows:
        if "original" in row and (row["prompt_id"], row["original"]) in responses:
            linked_ids.add(row["id"])
        if row["id"] == item_id or ("a" in row and item_id in (row["a"]["id"], row["b"]["id"])):
            linked_ids |= _row_ids(row)
    for row in rows:
        if "a" in row and row["id"] in linked_ids:
            linked_ids |= {row["a"]["id"], row["b"]["id"]}
    return linked_ids


def _row_ids(row: Mapping[str, Any]) -> set[str]:
    """A row's id, and that of the pair that a preference is about."""
    return {row["id"], row["pair_id"]} if "pair_id" in row else {row["id"]}


def _row_lines(stage_id: str, row: Mapping[str, Any]) -> Iterator[str]:
    if "votes" in row:
        yield from _vote_lines(stage_id, row)
    elif "chosen" in row:
        yield (
            f"{stage_id}  preference {row['id']} about pair {row['pair_id']}: chosen with probability "
            f"{row['p_chosen']:.3f} (log-odds {row['log_odds']:+.2f}, {row['source']})"
        )
        yield from _labelled_lines("  chosen:   ", row["chosen"][-1]["content"])
        yield from _labelled_lines("  rejected: ", row["rejected"][-1]["content"])
    elif "rounds" in row:
        yield f"{stage_id}  revision {row['id']} by {printable(row['model'])}"
        yield from _labelled_lines("  response: ", row["original"])
        for number, revision_round in enumerate(row["rounds"], 1):
            yield f"  round {number}: {printable(revision_round['principle'])}, {revision_round['outcome']}"
            yield from _labelled_lines("    critique: ", revision_round["critique"])
            yield from _labelled_lines("    revision: ", revision_round["revision"])
    else:
        yield (
            f"{stage_id}  response {row['id']} by {printable(row['model'])}: {row['n_tokens']} tokens, "
            f"finish {row['finish_reason']}"
        )
        if row.get("reasoning"):
            yield from _labelled_lines("  reasoning: ", row["reasoning"])
        yield from _labelled_lines("  ", row["response"])


def _vote_lines(stage_id: str, row: Mapping[str, Any]) -> Iterator[str]:
    """Log-odds that a is the better one, by principle: with a shown first, with b shown first, and their mean."""
    yield f"{stage_id}  pair {row['id']} judged by {printable(row['judge'])}"
    for side in ("a", "b"):
        yield from _labelled_lines(f"  {side} {row[side]['id'][:8]}: ", row[side]["text"])
    if "human" in row:
        yield f"  people chose {'a' if row['human'] > 0.5 else 'b' if row['human'] < 0.5 else 'both'}"
    yield from (f"  {line}" for line in _vote_table(row))
    for label in row.get("labels", []):
        yield printable(f"  {label_line(label)}")
    for vote in row["votes"]:
        for rationale in vote.get("rationales", []):
            label = f"  {printable(vote['principle'])}, {vote['order'][0]} first, {rationale['log_odds']:+.2f}: "
            yield from _labelled_lines(label, rationale["text"])


def _vote_table(row: Mapping[str, Any]) -> list[str]:
    """The votes by principle and, for each stage that makes labels of them, the weight and weight × mean."""
    log_odds_by_principle: dict[str, dict[str, float]] = {}
    for vote in row["votes"]:
        log_odds_by_principle.setdefault(vote["principle"], {})[vote["order"]] = vote["log_odds"]
    labels: list[LabelSum] = row.get("labels", [])
    unit = "points for a" if row.get("method") == "rating" else "log-odds for a"
    headers = [unit, "a first", "b first", "mean", "better"]
    for label in labels:
        stage = f" {label['stage']}" if len(labels) > 1 else ""
        headers += [f"weight{stage}", f"weighted{stage}"]
    cells = []
    for index, (principle, log_odds) in enumerate(log_odds_by_principle.items()):
        mean = sum(log_odds.values()) / len(log_odds)
        by_order = [f"{log_odds[order]:+.2f}" if order in log_odds else "-" for order in ("ab", "ba")]
        line = [principle, *by_order, f"{mean:+.2f}", "a" if mean > 0 else "b" if mean < 0 else "even"]
        for label in labels:
            term = label["terms"][index]
            line += [f"{term['weight']:g}", "-" if term["weighted"] is None else f"{term['weighted']:+.2f}"]
        cells.append(line)
    return table(headers, cells)


def _labelled_lines(label: str, text: str) -> Iterator[str]:
    """Text after a label, its further lines in the same column."""
    lines = text.splitlines() or [""]
    yield label + printable(lines[0])
    for line in lines[1:]:
        yield " " * len(label) + printable(line)
