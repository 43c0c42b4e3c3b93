"""The Python code of the README and of the docs."""

import re


BLOCK = re.compile(
    r"^(?P<skip><!-- not run: [^\n]+ -->\n+)?```python\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
