"""The constitution: a YAML document of principles and character traits, compiled to what a model is asked.

`load_constitution` reads a document with everything that it extends. Left out: asking a model anything (stages do) and
judging whether a principle is a good one (its examples, put to a model, do).
"""

from cai.constitution.compiled import Constitution, Example, Principle, load_constitution
from cai.constitution.schema import json_schema

__all__ = ["Constitution", "Example", "Principle", "json_schema", "load_constitution"]
