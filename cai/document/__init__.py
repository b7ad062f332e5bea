"""YAML documents with positions: every problem in one is reported in one sentence, with its line and column."""

from cai.document.building import Node, resolve_scalar
from cai.document.reading import Document, error_at, load_document, parse_document
from cai.document.validation import validate

__all__ = ["Document", "Node", "error_at", "load_document", "parse_document", "resolve_scalar", "validate"]
