"""Constitutional AI and RLAIF post-training: author a constitution, run a recipe, compare checkpoints."""

__version__ = "0.1.0"
