"""A constitution as text for a terminal: its summary, its principles, and the requests that models get with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cai.constitution.compiled import Constitution, Example, Principle
from cai.storage.rows import Message
from cai.text.formatting import printable

if TYPE_CHECKING:
    from cai.templates import TemplateSet

PLACEHOLDER = Example((("user", "[what the user says]"),), "[a response]", "[another response]")
"""Takes the place of an example where a principle has none."""
CRITIQUE = "[what the critic wrote]"
INDENT = " " * 11


def summary(constitution: Constitution) -> dict[str, object]:
    """The counts and tags that `cai constitution check` reports of a document."""
    principles = constitution.principles
    return {
        "path": str(constitution.path), "name": constitution.name, "documents": len(constitution.documents),
        "principles": sum(not principle.trait for principle in principles),
        "traits": sum(principle.trait for principle in principles),
        "examples": sum(len(principle.examples) for principle in principles),
        "switched_off": sum(principle.weight == 0 for principle in principles),
        "tags": sorted({tag for principle in principles for tag in principle.tags}),
    }  # fmt: skip


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
            yield from _lines(f"  {label:9}{getattr(principle, label)}", INDENT)
        for number, example in enumerate(principle.examples, 1):
            turns = [f"{role}: {text}" if len(example.messages) > 1 else text for role, text in example.messages]
            yield f"  example {number}"
            yield from _lines(f"    prompt {' / '.join(turns)}", INDENT)
            yield from _lines(f"    better {example.better}", INDENT)
            yield from _lines(f"    worse  {example.worse}", INDENT)


def example_requests(principle: Principle, templates: TemplateSet) -> dict[str, list[Message]]:
    """The messages that critic, reviser and judge get about the principle's first example."""
    example = principle.examples[0] if principle.examples else PLACEHOLDER
    conversation = example.conversation
    return {
        "critic": templates.critique(conversation, example.worse, principle),
        "reviser": templates.revise(conversation, example.worse, CRITIQUE, principle),
        "judge": templates.compare(conversation, example.better, example.worse, principle),
    }


def request_lines(principle: Principle, templates: TemplateSet) -> Iterator[str]:
    """`example_requests` as text: each message word for word, under a ruled line."""
    for addressee, messages in example_requests(principle, templates).items():
        for message in messages:
            title = printable(f"{principle.id}: {addressee}, template set {templates.name}, {message['role']} message")
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
    return f"{principle.id}  ({'; '.join(facts)})  {principle.location}"


def _count(number: object, noun: str) -> str:
    return f"{number} {noun.removesuffix('s') if number == 1 else noun}"


def _lines(text: str, indent: str = "") -> Iterator[str]:
    """The lines of `text`, safe to print; all but the first are indented."""
    for number, line in enumerate(text.split("\n")):
        yield (indent if number else "") + printable(line)
