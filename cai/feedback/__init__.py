"""Votes of a judge and how they become labels, figures about both, and which part of a reviser's text is a revision."""
