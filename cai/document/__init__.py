"""YAML documents with positions: whatever is wrong with one is said in one sentence, at its line and column."""

from cai.document.building import Node, scalar
from cai.document.reading import Document, fail, load_document, parse_document, validate

__all__ = ["Document", "Node", "fail", "load_document", "parse_document", "scalar", "validate"]
