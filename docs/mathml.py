"""A hook of MkDocs: turns LaTeX formulas into MathML while the site is built.

Browsers draw MathML by themselves, so that the site needs no script for mathematics. A formula
that cannot be converted stops the build.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert


# What `pymdownx.arithmatex` makes of `$...$` and `$$...$$`.
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)

# What the converter does not know, in words that it does.
_REWRITE = [
    (re.compile(r"\\(begin|end)\{aligned\}"), r"\\\1{align*}"),
    (re.compile(r"\\mathrm\{(\w\w+)\}"), r"\\operatorname{\1}"),
    (re.compile(r"\\arg\b"), r"\\operatorname{arg}"),
    (re.compile(r"\\Big\\\{"), r"\\left\\lbrace"),
    (re.compile(r"\\Big\\\}"), r"\\right\\rbrace"),
]
_BAD = re.compile(r"\\|<mi>&</mi>")


def on_page_content(content: str, **_: Any) -> str:
    content = _INLINE.sub(lambda match: _mathml(match[1], "inline"), content)
    return _BLOCK.sub(lambda match: _mathml(match[1], "block"), content)


def _mathml(formula: str, display: str) -> str:
    latex = html.unescape(formula).strip()
    for pattern, replacement in _REWRITE:
        latex = pattern.sub(replacement, latex)
    result = convert(latex, display=display).replace(r"\_", "_")  # in `\texttt`
    if _BAD.search(result):
        raise ValueError(f"This formula cannot be converted to MathML: {latex}")
    return result
