"""YAML documents with positions: every problem in one is reported in one sentence, with its line and column."""

from cai.document.kinds import check_kind
from cai.document.problems import Problem, Problems, WrongDocument, problems_of
from cai.document.reading import Document, error_at, load_document, override_value, parse_document
from cai.document.validation import validate

__all__ = [
    "Document", "Problem", "Problems", "WrongDocument", "check_kind", "error_at", "load_document", "override_value",
    "parse_document", "problems_of", "validate",
]  # fmt: skip
