"""Every question is a path of its prefix tree, and what questions share is in the tree once."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from cai.attention.prefix_trees import Node, build_trees, split_into_questions

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
