"""Shared prefixes: trees of questions, batches within a token budget, and attention to prefix and own tokens."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cai.attention.prefix_trees import Node, build_trees, split_into_questions
from cai.attention.shared_prefixes import OwnKeyValues, PrefixGroups, PrefixKeyValues, joint_attention
from cai.attention.token_batches import batch_by_tokens

PIECES = st.sampled_from([[1], [1, 2], [3, 4, 5], [6] * 9, [7, 8] * 4])
QUESTIONS = st.lists(
    st.lists(PIECES, min_size=1, max_size=5).map(lambda pieces: [*itertools.chain(*pieces)]), min_size=1, max_size=30
)


@given(questions=QUESTIONS)
@settings(max_examples=100, deadline=None)
def test_every_question_is_the_path_to_one_node(questions: list[list[int]]) -> None:
    trees = build_trees(questions)
    visited: list[int] = []

    def visit(node: Node, path: list[int]) -> None:
        path = [*path, *node.token_ids]
        for question in node.complete:
            assert path == questions[question]
            visited.append(question)
        assert node.complete or node.children
        for child in node.children:
            visit(child, path)

    for tree in trees:
        visit(tree, [])
    assert sorted(visited) == list(range(len(questions)))
    visited.clear()
    for tree in trees:
        for node in split_into_questions(tree):
            assert not node.children
            visit(node, [])
    assert sorted(visited) == list(range(len(questions)))


def test_what_is_shared_is_in_the_tree_once_unless_it_is_too_short() -> None:
    pairs = [[pair] * 170 for pair in (1, 2, 3)]
    questions = [pair + [10 + n] * 20 for pair in pairs for n in range(16)]
    assert [tree.n_tokens for tree in build_trees(questions)] == [170 + 16 * 20] * 3
    conversations = [[7] * 300 + question for question in questions]
    (tree,) = build_trees(conversations)
    assert [len(node.children) for node in (tree, *tree.children)] == [3, 16, 16, 16]
    short_beginning = [[7, 8, *question] for question in questions]
    assert [len(tree.children) for tree in build_trees(short_beginning)] == [16, 16, 16]


def test_batches_stay_within_the_token_budget() -> None:
    lengths = sorted([5, 9, 3, 12, 40, 7, 7, 200])
    batches = list(batch_by_tokens(lengths, 40))
    assert [length for first, last in batches for length in lengths[first:last]] == lengths
    assert all((last - first) * lengths[last - 1] <= 40 or last - first == 1 for first, last in batches)
    assert list(batch_by_tokens([], 40)) == []


@pytest.mark.usefixtures("pads_sizes")
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize(
    ("prefix_of_row", "max_size"), [([0, 0, 1, 1], 9), ([1, 0, 0, 2, 0, 0, 0], 9), ([2, 2, 2, 0], 1)]
)
def test_joint_attention_is_attention_to_both_parts(prefix_of_row: list[int], max_size: int, heads: int) -> None:
    torch.manual_seed(0)
    n_rows, kv_heads, width, length, own_length = len(prefix_of_row), 2, 8, 5, 3
    keys, values = torch.randn(3, kv_heads, length, width), torch.randn(3, kv_heads, length, width + 3)
    mask = torch.ones(3, length, dtype=torch.bool)
    mask[1, 3:] = False
    query, own_keys = torch.randn(n_rows, heads, own_length, width), torch.randn(n_rows, kv_heads, own_length, width)
    own_values = torch.randn(n_rows, kv_heads, own_length, width + 3)
    causal = torch.ones(own_length, own_length, dtype=torch.bool).tril()
    prefix_mask = mask[prefix_of_row][:, None].expand(-1, own_length, -1)
    all_keys = torch.cat([keys[prefix_of_row], own_keys], dim=2)
    all_values = torch.cat([values[prefix_of_row], own_values], dim=2)
    all_masks = torch.cat([prefix_mask, causal.expand(n_rows, -1, -1)], dim=-1)[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, all_keys, all_values, attn_mask=all_masks, enable_gqa=True
    )
    device = torch.device("cpu")
    own_bias = torch.zeros(own_length, own_length).masked_fill(~causal, -1e30).repeat(heads // kv_heads, 1)
    rows_of = {prefix: [n for n in range(n_rows) if prefix_of_row[n] == prefix] for prefix in set(prefix_of_row)}
    by_prefix = [
        PrefixGroups([prefix], len(rows), [(0, slot) for slot in range(len(rows))], device, rows)
        for prefix, rows in sorted(rows_of.items())
    ]
    bias = torch.zeros(mask.shape).masked_fill(~mask, -1e30)
    own = OwnKeyValues(own_keys.transpose(-1, -2), own_values, own_bias)
    scaled_query = (query * width**-0.5).reshape(n_rows, kv_heads, -1, width)
    for parts in ([PrefixGroups.build(prefix_of_row, max_size, device)], by_prefix):
        prefixes = []
        for groups in parts:
            n = groups.prefixes
            prefixes.append(PrefixKeyValues(keys.transpose(-1, -2)[n], values[n], bias[n][:, None, None], groups))
        out = joint_attention(scaled_query, prefixes, own)
        torch.testing.assert_close(out.reshape(expected.shape), expected, atol=1e-6, rtol=1e-5)
