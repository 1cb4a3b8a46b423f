"""The package's readme and addresses, for the page that an index makes of them.

An index shows README.md without the repository around it. ``SLRA_URL=https://... python -m build`` says where that is:
links and pictures then lead there, and it becomes the project's address. Without it they are left out, the words stay.
"""

import os
import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:)([^)]+)\)")


def readme(text: str, url: str | None) -> str:
    """Make links and pictures absolute, or take them away where nothing is known of the repository."""

    def absolute(match: re.Match[str]) -> str:
        is_picture, words, path = match.groups()
        if url is None:
            return "" if is_picture else words
        return f"{is_picture}[{words}]({url}/{'raw' if is_picture else 'blob'}/main/{path})"

    text = re.sub(r"<!-- (?:table: [^>]*|end) -->\n", "", text)
    return LINK.sub(absolute, text).replace("git clone URL", f"git clone {url or 'URL'}")


class Metadata(MetadataHookInterface):
    """Fill in what pyproject.toml declares as dynamic."""

    def update(self, metadata: dict) -> None:
        """Add readme and addresses."""
        url = os.environ.get("SLRA_URL", "").rstrip("/") or None
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": readme(text, url)}
        if url:
            metadata["urls"] = {
                "Repository": url,
                "Documentation": f"{url}/tree/main/docs",
                "Changelog": f"{url}/blob/main/CHANGELOG.md",
                "Issues": f"{url}/issues",
            }
