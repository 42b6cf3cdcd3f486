"""What the site holds beside the pages of docs/ (a hook of mkdocs): files of the repository's root."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
COPIED = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}  # a page, and the file that it is


def on_files(files: Files, config: Any) -> Files:
    for page, name in COPIED.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links as they are in the repository lead out of docs/, or into it from its root."""
    for page, name in COPIED.items():
        markdown = re.sub(rf"\]\((?:\.\./)?{re.escape(name)}", f"]({page}", markdown)
    return re.sub(r"\]\(docs/", "](", markdown)
