"""YAML documents with positions: every problem in one is reported in one sentence, with its line and column."""

from cai.document.reading import Document, error_at, load_document, override_value, parse_document
from cai.document.validation import validate

__all__ = ["Document", "error_at", "load_document", "override_value", "parse_document", "validate"]
