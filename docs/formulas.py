"""A hook of MkDocs that renders LaTeX formulas with KaTeX while the site is built.

Pages contain the finished formulas, so readers need no script, and a formula with an error stops
the build. `docs/katex/` holds the files of KaTeX 0.19.1 that this needs (`dist/` of its package on
npm): the program, which is not part of the site, and the style sheet with its fonts, which is.
"""

import functools
import html
import re
from pathlib import Path
from typing import Any

from py_mini_racer import MiniRacer


_PROGRAM = Path(__file__).with_name("katex") / "katex.min.js"

# The output of `pymdownx.arithmatex` for `$...$` and `$$...$$`.
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    content = _INLINE.sub(lambda match: _render(match[1], is_block=False), content)
    return _BLOCK.sub(lambda match: _render(match[1], is_block=True), content)


def _render(formula: str, *, is_block: bool) -> str:
    options = {"displayMode": is_block, "throwOnError": True, "strict": "error"}
    latex = html.unescape(formula).strip()
    return str(_engine().call("katex.renderToString", latex, options))


@functools.cache
def _engine() -> MiniRacer:
    engine = MiniRacer()
    engine.eval(_PROGRAM.read_text("utf-8"))
    return engine
