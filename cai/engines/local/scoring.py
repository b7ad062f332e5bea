"""Log-probabilities of options as the next token, for many questions that begin alike.

The questions form prefix trees (`cai.attention.prefix_trees`); each node is prefilled once, as a continuation of its
parent (`cai.attention.prefill`). The trees are walked depth first, so that keys and values are held of one path of
batches. Left out: options of several tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from cai.attention.cpu_tuning import tokens_per_pass
from cai.attention.prefill import prefill
from cai.attention.prefix_trees import Node, build_trees, split_into_questions
from cai.attention.shared_prefixes import Prefixes
from cai.attention.token_batches import batch_by_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_QUESTIONS_PER_CALL = 256
"""Questions whose logits are normalised at once."""
OptionLogProbs = list[float]


class PromptAndOptions(NamedTuple):
    """A question: the prompt's ids, and the id of each option."""

    prompt: list[int]
    options: list[int]


def score(
    model: PreTrainedModel, questions: Sequence[PromptAndOptions], token_budget: int
) -> Iterator[tuple[int, OptionLogProbs]]:
    """(index, the options' log-probabilities) of every question; about `token_budget` tokens are held at once."""
    trees = build_trees([question.prompt for question in questions])
    return _score_nodes(model, [(tree, 0) for tree in trees], questions, token_budget)


def _score_nodes(
    model: PreTrainedModel, nodes: Sequence[tuple[Node, int]], questions: Sequence[PromptAndOptions],
    token_budget: int, prefixes: Prefixes | None = None,
) -> Iterator[tuple[int, OptionLogProbs]]:  # fmt: skip
    """The answers to the questions that end in or below these nodes, each with the index of the prefix it continues.

    `token_budget` is for tokens held besides `prefixes`. Half of it goes to a batch of nodes with children, whose rows
    each hold a copy of their prefix. A node for which that would be too long is split into its questions.
    """
    prefix_length = 0 if prefixes is None else prefixes.mask.shape[1]
    if prefixes is not None:
        unsplit, nodes = nodes, []
        for node, prefix in unsplit:
            fits = not node.children or prefix_length + len(node.token_ids) <= token_budget
            nodes += [(part, prefix) for part in ([node] if fits else split_into_questions(node))]
    for has_children in (True, False):
        ordered = [(node, prefix) for node, prefix in nodes if bool(node.children) is has_children]
        ordered.sort(key=lambda pair: len(pair[0].token_ids))
        batches = batch_by_tokens(
            [len(node.token_ids) for node, _ in ordered],
            tokens_per_pass(token_budget, model.device),
            prefix_length=prefix_length if has_children else 0,
            max_tokens_with_prefix=token_budget // 2 if has_children else float("inf"),
        )
        for first, last in batches:
            batch = sorted(ordered[first:last], key=lambda pair: pair[1])
            token_ids, prefix_of_row = [node.token_ids for node, _ in batch], [prefix for _, prefix in batch]
            logits, build_prefixes = prefill(model, token_ids, prefixes, prefix_of_row)
            complete = [(row, question) for row, (node, _) in enumerate(batch) for question in node.complete]
            if complete:
                scores = option_log_probs(logits, [(row, questions[question].options) for row, question in complete])
                yield from zip([question for _, question in complete], scores, strict=True)
            batch_prefixes = build_prefixes() if has_children else None
            del logits, build_prefixes  # they would stay until the nodes below, or the next batch, are computed
            if batch_prefixes is not None:
                children = [(child, row) for row, (node, _) in enumerate(batch) for child in node.children]
                budget_left = token_budget - batch_prefixes.mask.numel()
                yield from _score_nodes(model, children, questions, budget_left, batch_prefixes)
                del batch_prefixes


def option_log_probs(logits: Tensor, options: Sequence[tuple[int, Sequence[int]]]) -> list[OptionLogProbs]:
    """Log-probabilities of `options`, (row, option ids) each, from (rows, vocabulary) logits."""
    scores: list[OptionLogProbs] = []
    for first in range(0, len(options), _QUESTIONS_PER_CALL):
        part = options[first : first + _QUESTIONS_PER_CALL]
        log_probs = logits[[row for row, _ in part]].float().log_softmax(dim=-1).double().cpu()
        scores += [log_probs[index, list(ids)].tolist() for index, (_, ids) in enumerate(part)]
    return scores
