"""One item's life: prompt, responses, critiques and revisions, votes by principle and order, preference.

Reads what the feedback stages of a run have left. All text comes from models and users: it is shown line by line,
without anything that could steer a terminal.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cai.storage import run_folder
from cai.storage.files import read_json
from cai.storage.journal import RECORDS
from cai.storage.rows import read_rows
from cai.text.errors import BadInput
from cai.text.formatting import printable
from cai.text.tables import table

Life = dict[str, list[dict[str, Any]]]
"""Stage id to the rows that belong to an item, in the order of the recipe."""


def life(run: Path, item: str | None) -> Life:
    """The rows about one item: an id, or the unique beginning of one; a prompt at random for None.

    A prompt's id gives everything about that prompt; a row's id gives the row and what it is linked to.
    """
    rows = _all_rows(run)
    if not any(rows.values()):
        raise BadInput(f"{run}: no stage of this run has left rows yet")
    everything = [row for each in rows.values() for row in each]
    if item is None:
        chosen = random.choice(sorted({row["prompt_id"] for row in everything}))
    else:
        chosen = _unique({name for row in everything for name in (row["id"], row["prompt_id"])}, item, run)
    linked = _linked(everything, chosen)
    found = {
        stage: [row for row in each if row["prompt_id"] == chosen or _names(row) & linked]
        for stage, each in rows.items()
    }
    return {stage: each for stage, each in found.items() if each}


def life_lines(life: Life) -> Iterator[str]:
    """The item's life as a person reads it."""
    first = next(iter(life.values()))[0]
    yield f"prompt {first['prompt_id']}  {' '.join(printable(tag) for tag in first['tags'])}"
    for message in first["prompt"]:
        yield from _text(message["content"], f"  {message['role']}: ")
    for stage, rows in life.items():
        for row in rows:
            yield ""
            yield from _row_lines(stage, row)


def _all_rows(run: Path) -> Life:
    """The rows of every finished feedback stage."""
    latest = run_folder.latest(run)
    found: Life = {}
    for stage in (read_json(run / run_folder.RUN) or {"stages": []})["stages"]:
        folder = latest.get(stage)
        if folder is None or run_folder.finished(folder) is None:
            continue
        if (read_json(folder / run_folder.STAGE) or {}).get("gives") in {"texts", "votes", "preferences"}:
            found[stage] = read_rows(folder / RECORDS)
    return found


def _unique(ids: set[str], beginning: str, run: Path) -> str:
    matches = sorted(each for each in ids if each.startswith(beginning))
    if beginning in ids:
        return beginning
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


def _linked(rows: list[dict[str, Any]], chosen: str) -> set[str]:
    """Ids that belong to the row `chosen`: itself, its responses, and the pairs it is part of."""
    linked = {chosen}
    texts = {(row["prompt_id"], row["response"]) for row in rows if row["id"] == chosen and "response" in row}
    for row in rows:
        if "original" in row and (row["prompt_id"], row["original"]) in texts:
            linked.add(row["id"])
        if row["id"] == chosen or ("a" in row and chosen in (row["a"]["id"], row["b"]["id"])):
            linked |= {row["id"]} | ({row["pair_id"]} if "pair_id" in row else set())
    for row in rows:
        if "a" in row and row["id"] in linked:
            linked |= {row["a"]["id"], row["b"]["id"]}
    return linked


def _names(row: Mapping[str, Any]) -> set[str]:
    """Ids by which a row belongs to an item."""
    return {row["pair_id"]} | {row["id"]} if "pair_id" in row else {row["id"]}


def _row_lines(stage: str, row: Mapping[str, Any]) -> Iterator[str]:
    if "votes" in row:
        yield from _vote_lines(stage, row)
    elif "chosen" in row:
        yield (
            f"{stage}  preference {row['id']} about pair {row['pair_id']}: chosen with probability "
            f"{row['p_chosen']:.3f} (log-odds {row['log_odds']:+.2f}, {row['source']})"
        )
        yield from _text(row["chosen"][-1]["content"], "  chosen:   ")
        yield from _text(row["rejected"][-1]["content"], "  rejected: ")
    elif "rounds" in row:
        yield f"{stage}  revision {row['id']} by {printable(row['model'])}"
        yield from _text(row["original"], "  response: ")
        for number, each in enumerate(row["rounds"], 1):
            yield f"  round {number}: {printable(each['principle'])}, {each['outcome']}"
            yield from _text(each["critique"], "    critique: ")
            yield from _text(each["revision"], "    revision: ")
    else:
        yield (
            f"{stage}  response {row['id']} by {printable(row['model'])}: {row['n_tokens']} tokens, "
            f"finish {row['finish_reason']}"
        )
        if row.get("reasoning"):
            yield from _text(row["reasoning"], "  reasoning: ")
        yield from _text(row["response"], "  ")


def _vote_lines(stage: str, row: Mapping[str, Any]) -> Iterator[str]:
    """Log-odds that a is the better one, by principle, shown first and shown second, and averaged."""
    yield f"{stage}  pair {row['id']} judged by {printable(row['judge'])}"
    yield from _text(row["a"]["text"], f"  a {row['a']['id'][:8]}: ")
    yield from _text(row["b"]["text"], f"  b {row['b']['id'][:8]}: ")
    if "human" in row:
        yield f"  people chose {'a' if row['human'] > 0.5 else 'b' if row['human'] < 0.5 else 'both'}"
    by_principle: dict[str, dict[str, float]] = {}
    for vote in row["votes"]:
        by_principle.setdefault(vote["principle"], {})[vote["order"]] = vote["log_odds"]
    cells = []
    for principle, orders in by_principle.items():
        mean = sum(orders.values()) / len(orders)
        cells.append(
            [
                principle,
                *(f"{orders[order]:+.2f}" if order in orders else "-" for order in ("ab", "ba")),
                f"{mean:+.2f}",
                "a" if mean > 0 else "b" if mean < 0 else "even",
            ]
        )
    rated = row.get("method") == "rating"
    for line in table(["points for a" if rated else "log-odds for a", "a first", "b first", "mean", "better"], cells):
        yield f"  {line}"
    for vote in row["votes"]:
        for thought in vote.get("rationales", []):
            about = f"  {printable(vote['principle'])}, {vote['order'][0]} first, {thought['log_odds']:+.2f}: "
            yield from _text(thought["text"], about)


def _text(text: str, label: str) -> Iterator[str]:
    """Text under a label, its further lines in the same column."""
    lines = text.splitlines() or [""]
    yield label + printable(lines[0])
    for line in lines[1:]:
        yield " " * len(label) + printable(line)
