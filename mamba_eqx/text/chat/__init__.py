"""Chat templates, run by an interpreter that knows who has written each character."""

from ._render import render_text as render_text
from ._written import TEMPLATE as TEMPLATE, USER as USER, Text as Text
