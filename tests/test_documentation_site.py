"""The pages of docs/ build as a site without warnings, and the site loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def test_the_site_has_every_page():
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = re.findall(r"[\w-]+\.md", str(navigation))
    assert sorted(pages) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_links_of_the_readme_lead_to_files_and_headings():
    for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([\w-]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        headings = re.findall(r"^#+ (.*)$", (ROOT / (target or "README.md")).read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in [heading.lower().replace(" ", "-") for heading in headings], f"{target}#{anchor}"


def test_the_site_builds_without_warnings_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("material", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    for page in (tmp_path / "site").glob("*.html"):
        html = page.read_text(encoding="utf-8")
        assert not re.search(r"<(link|script|img|iframe)\b[^>]*(href|src)=\"?(https?:)?//", html), page.name
        sentences = re.sub(r"<(pre|code|script)\b.*?</\1>", "", html, flags=re.DOTALL)
        assert "](" not in sentences, f"{page.name}: a link that Markdown did not read"
