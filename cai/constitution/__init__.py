"""The constitution: a YAML document of principles and character traits, compiled to principle fields for models.

`load_constitution` reads a document with those that it extends. Left out: requests to models, which stages make, and
the quality of a principle, which `cai constitution test` measures on its examples.
"""

from cai.constitution.compiled import Constitution, Example, Principle, applicable_principles
from cai.constitution.inheritance import load_constitution, with_text
from cai.constitution.schema import json_schema

__all__ = [
    "Constitution",
    "Example",
    "Principle",
    "applicable_principles",
    "json_schema",
    "load_constitution",
    "with_text",
]
