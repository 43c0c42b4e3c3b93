"""A hook of MkDocs that adds links to Colab to the page of notebooks.

Colab opens notebooks from repositories on GitHub, whose address `REPOSITORY_URL` tells.
"""

import re
from typing import Any


_NOTEBOOK = re.compile(r"\(notebooks/(\w+)\.ipynb\)\{ \.notebook \}")
_GITHUB = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+?)/?")


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    match = _GITHUB.fullmatch(config.repo_url or "")
    if match is None:
        return markdown
    folder = f"https://colab.research.google.com/github/{match[1]}/blob/main/docs/notebooks"
    return _NOTEBOOK.sub(rf"\g<0>, [open in Colab]({folder}/\1.ipynb)", markdown)
