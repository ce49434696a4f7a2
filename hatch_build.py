"""The README as an index of packages shows it, far from the files that it links to."""

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class ReadmeHook(MetadataHookInterface):
    """Makes the README's links absolute where ``REPOSITORY_URL`` says where the repository is.

    Pictures are linked as ``URL/raw/vVERSION/...``, all else as ``URL/blob/vVERSION/...``: so a
    release shows the files of its own tag.
    """

    def update(self, metadata: dict[str, Any]) -> None:
        """Put the README's text into the metadata."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        if repository := os.environ.get("REPOSITORY_URL"):
            text = _with_absolute_links(text, repository.rstrip("/"), f"v{metadata['version']}")
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def _with_absolute_links(text: str, repository: str, tag: str) -> str:
    def absolute(match: re.Match[str]) -> str:
        mark, label, link = match.groups()
        return f"{mark}[{label}]({repository}/{'raw' if mark else 'blob'}/{tag}/{link})"

    return re.sub(r"(!?)\[([^]]*)\]\((?!https?:|#)([^)]+)\)", absolute, text)
