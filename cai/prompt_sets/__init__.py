"""Prompt sets and human preferences, read from files.

A row has a `prompt` (text, or a list of messages), or `messages`; `columns:` of the recipe maps other names. hh-rlhf
transcripts (Bai et al. 2022, arXiv 2204.05862) are read with all their turns: the prompt is the `chosen` transcript up
to and including its last `Human:` turn, and a human preference is the last answers of the two transcripts.

A row that cannot be read is an error with file and line, because a file with a wrong row is usually the wrong file.
Repeated prompts of a set are used once and counted. Left out: images, tools, streaming, files on the network.
"""

from cai.prompt_sets.prompt_rows import HumanPairs, PromptRows, load_human_pairs, read_prompt_set
from cai.prompt_sets.prompt_set_config import MICRO, PairSet, PromptSet

__all__ = ["MICRO", "HumanPairs", "PairSet", "PromptRows", "PromptSet", "load_human_pairs", "read_prompt_set"]
