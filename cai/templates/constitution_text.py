"""A constitution as text for a terminal: its summary, the compiled document, and what models would be asked with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cai.constitution.compiled import Constitution, Example, Principle
from cai.storage.rows import Message
from cai.text.formatting import printable

if TYPE_CHECKING:
    from cai.templates import TemplateSet

PLACEHOLDER = Example((("user", "[what the user says]"),), "[a response]", "[another response]")
"""Stands for an example where a principle has none."""
CRITIQUE = "[what the critic wrote]"


def summary(constitution: Constitution) -> dict[str, object]:
    """What `check` says about a document."""
    principles = constitution.principles
    return {
        "path": str(constitution.path),
        "name": constitution.name,
        "documents": len(constitution.documents),
        "principles": sum(not each.trait for each in principles),
        "traits": sum(each.trait for each in principles),
        "examples": sum(len(each.examples) for each in principles),
        "switched_off": sum(each.weight == 0 for each in principles),
        "tags": sorted({tag for each in principles for tag in each.tags}),
    }


def summary_line(constitution: Constitution) -> str:
    """`summary` as one line."""
    facts = summary(constitution)
    counts = [_count(facts[noun], noun) for noun in ("principles", "traits", "examples", "documents")]
    off = f", {facts['switched_off']} switched off" if facts["switched_off"] else ""
    return printable(f"{constitution.path}: {constitution.name}: {', '.join(counts)}{off}")


def document_lines(constitution: Constitution) -> Iterator[str]:
    """The compiled document, principle by principle."""
    yield from _lines(f"{constitution.name}: {constitution.description}".removesuffix(": "))
    for principle in constitution.principles:
        yield ""
        yield from _lines(_heading(principle))
        for label in ("text", "critique", "revise", "compare"):
            yield from _lines(f"  {label:9}{getattr(principle, label)}", " " * 11)
        for number, example in enumerate(principle.examples, 1):
            said = " / ".join(
                f"{role}: {text}" if len(example.messages) > 1 else text for role, text in example.messages
            )
            yield from _lines(f"  example {number}", "")
            yield from _lines(f"    prompt {said}", " " * 11)
            yield from _lines(f"    better {example.better}", " " * 11)
            yield from _lines(f"    worse  {example.worse}", " " * 11)


def asked(principle: Principle, templates: TemplateSet) -> dict[str, list[Message]]:
    """The messages that a critic, a reviser and a judge get, with the principle's first example as the material."""
    example = principle.examples[0] if principle.examples else PLACEHOLDER
    conversation = example.conversation
    return {
        "critic": templates.critique(conversation, example.worse, principle),
        "reviser": templates.revise(conversation, example.worse, CRITIQUE, principle),
        "judge": templates.compare(conversation, example.better, example.worse, principle),
    }


def asked_lines(principle: Principle, templates: TemplateSet) -> Iterator[str]:
    """`asked` as text: the words are exactly those that a model gets, between ruled lines."""
    for who, messages in asked(principle, templates).items():
        for message in messages:
            title = printable(f"{principle.id}: {who}, template set {templates.name}, {message['role']} message")
            yield f"----- {title} -----"
            yield from _lines(message["content"])
        yield ""


def _heading(principle: Principle) -> str:
    facts = [f"weight {principle.weight:g}"]
    if principle.trait:
        facts.append("trait")
    if principle.tags:
        facts.append(f"tags {', '.join(principle.tags)}")
    if principle.applies_to is not None:
        facts.append(f"for prompts tagged {' or '.join(principle.applies_to)}")
    return f"{principle.id}  ({'; '.join(facts)})  {principle.where}"


def _count(number: object, noun: str) -> str:
    return f"{number} {noun.removesuffix('s') if number == 1 else noun}"


def _lines(text: str, indent: str = "") -> Iterator[str]:
    """The lines of `text`, safe to print, all but the first of them indented."""
    lines: Sequence[str] = text.split("\n")
    for number, line in enumerate(lines):
        yield (indent if number else "") + printable(line)
