"""Grammars, by the package `llguidance`."""

import functools
import json
import re
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from jaxtyping import Bool

from ...text import ByteTokenizer, TextTokenizer
from ..sampling import shorten
from ._protocols import Matcher


if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer


_LONGEST = 2**15  # characters of a schema or an expression
_MOST_INTERSECTIONS = 32  # The time that llguidance takes for them grows fast, and is not limited.
_LONGEST_ERROR = 300  # characters
_STACK = 2**26  # bytes
# Without it, a text that the grammar fixes would be tokenized at once, however long it is.
_NO_FORCING = '\n%llguidance {"no_forcing": true}'
# A weak model could write white space for ever.
_JSON_OPTIONS = {"whitespace_pattern": "[ \\t\\r\\n]{1,32}"}
_Result = TypeVar("_Result")


class Grammar:
    """A grammar that texts must match: a JSON schema, a regular expression, or a Lark grammar.

    A text can only end where the grammar accepts it: the tokens that end texts are allowed there
    alone, and a text also ends when nothing can follow. A text that is cut off, by
    `max_new_tokens` or by a stop string, is the beginning of one that matches. The grammar
    constrains the generated text, without the prompt.

    ```python
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    grammar = mbx.generation.Grammar.from_json_schema(schema, tokenizer)
    sampling = mbx.Sampling(constraint=grammar).for_model(model, tokenizer)
    for token in mbx.stream(model, prompt, 100, sampling):
        ...
    ```

    A grammar can be used for any number of texts. Its work is limited: an expression that is too
    complex raises a `ValueError`, when it is read or at the token where a limit is reached.

    Requires the package `llguidance`: `pip install "mamba_eqx[structured]"`.

    Reference: <https://github.com/guidance-ai/llguidance>, which computes the masks.
    """

    def __init__(self, lark: str, tokenizer: TextTokenizer | ByteTokenizer):
        """**Arguments:**

        - `lark`: a grammar in llguidance's variant of Lark, whose rule `start` is the whole text.
            It must come from a trusted source: unlike schemas and regular expressions, a grammar
            can be ambiguous, which can take minutes for a token, and one of thousands of nested
            rules can end the process.
        - `tokenizer`: the tokenizer of the model.

        **Raises:** `ValueError` if the grammar cannot be read; `ImportError` if the package
        `llguidance` is not installed.
        """
        if not isinstance(tokenizer, TextTokenizer | ByteTokenizer):
            raise ValueError(
                "`tokenizer` must be a `TextTokenizer` or a `ByteTokenizer`, but got "
                f"tokenizer={shorten(tokenizer)}. Give the tokenizer of the model."
            )
        self._tokens = _tokens(tokenizer)
        self._template = _with_deep_stack(lambda: self._tokens.read(lark))

    @classmethod
    def from_json_schema(
        cls, schema: Mapping[str, object] | bool, tokenizer: TextTokenizer | ByteTokenizer
    ) -> "Grammar":
        """Makes a grammar of the JSON texts that a schema accepts.

        Properties are written in the order of the schema, with at most 32 characters of white
        space between two parts. Keywords that are not supported are refused; see llguidance's
        documentation for those that are. References to other documents are never fetched.

        **Arguments:**

        - `schema`: the parsed JSON schema, of at most 32,768 characters as JSON.
        - `tokenizer`: the tokenizer of the model.

        **Returns:**

        The grammar.

        **Raises:** `ValueError` if the schema is invalid, too complex, or accepts no text;
        `ImportError` if the package `llguidance` is not installed.
        """
        given = {"allOf": [schema]} if isinstance(schema, bool) else schema
        if not isinstance(given, Mapping):
            raise ValueError(
                f"`schema` must be a JSON schema, but got schema={shorten(schema)}. Give a mapping."
            )
        try:
            text = json.dumps({**given, "x-guidance": _JSON_OPTIONS})
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"`schema` must be values of JSON, but {type(error).__name__}: {error}. Give what "
                "`json.loads` returns."
            ) from None
        _check_length("schema", text)
        count = _intersections(json.loads(text))
        if count > _MOST_INTERSECTIONS:
            raise ValueError(
                f"`schema` must have at most {_MOST_INTERSECTIONS} entries in all of its `allOf` "
                f"and `patternProperties`, but has {count}. Simplify it."
            )
        return cls(f"start: %json {text}", tokenizer)

    @classmethod
    def from_regex(cls, pattern: str, tokenizer: TextTokenizer | ByteTokenizer) -> "Grammar":
        """Makes a grammar of the texts that a regular expression matches as a whole.

        **Arguments:**

        - `pattern`: the expression, in the syntax of the `regex` crate of Rust, of at most 32,768
            characters. It has no look-around and no back-references, and a dot is any character
            but a line feed.
        - `tokenizer`: the tokenizer of the model.

        **Returns:**

        The grammar.

        **Raises:** `ValueError` if the expression is invalid or too complex; `ImportError` if the
        package `llguidance` is not installed.
        """
        if not isinstance(pattern, str):
            raise ValueError(f"`pattern` must be text, but got pattern={shorten(pattern)}.")
        _check_length("pattern", pattern)
        if len(re.findall(r"\\*$", pattern)[0]) % 2:
            raise ValueError(
                f"`pattern` must not end within an escape, but got {shorten(pattern)}. Double the "
                "last backslash."
            )
        # Between slashes, an empty expression would be a comment.
        body = f"/{_llguidance().regex_to_lark(pattern, '')}/" if pattern else '""'
        return cls(f"start: {body}", tokenizer)

    def start(self) -> Matcher:
        """Returns a matcher for a new text. Any thread may call this."""
        return _GrammarMatcher(self._template.deep_copy(), self._tokens)


class _GrammarMatcher:
    """The progress of one text along a [`mamba_eqx.generation.Grammar`][]."""

    def __init__(self, matcher: "LLMatcher", tokens: "_Tokens"):
        self._matcher, self._tokens = matcher, tokens
        self._ended = False

    @property
    def complete(self) -> bool:
        """Whether the grammar accepts the text as it is."""
        return self._ended or self._matcher.is_accepting()

    def allowed(self) -> Bool[np.ndarray, " vocab"]:
        """Computes which tokens may come next; see [`mamba_eqx.generation.Matcher`][].

        **Raises:** `ValueError` if a limit of the grammar's work is reached, or the tokenizer has
        no token for what must follow.
        """
        size = self._tokens.size
        if self._ended:
            return np.zeros(size, bool)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, count=size, bitorder="little").astype(bool)

    def advance(self, token: int) -> None:
        """Notes another token; see [`mamba_eqx.generation.Matcher`][].

        **Raises:** `ValueError` if the token is not allowed, or a limit is reached.
        """
        if token in self._tokens.ends and self.complete:
            self._ended = True
            return
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if not self._matcher.is_error():
            return
        why = self._matcher.get_error()
        if why.startswith("NoExtensionBias"):
            raise ValueError(
                "The grammar must allow a token here, but none fits. Use a grammar that accepts "
                "texts which the tokenizer can write."
            )
        raise ValueError(f"The grammar cannot go on: {_shown(why)}. Use a simpler one.")


class _Tokens:
    """A tokenizer as llguidance sees it."""

    def __init__(self, tokenizer: TextTokenizer | ByteTokenizer):
        module = _llguidance()
        self.ends = frozenset(tokenizer.stop_tokens)
        self.size = max(tokenizer.vocab_size, *(token + 1 for token in self.ends), 0)
        # llguidance needs a token that ends texts. Without one, an id that no model has stands in.
        ends = sorted(self.ends) or [self.size]
        ids = tokenizer.token_ids - self.ends
        self.eos_token_id = ends[0]
        self.bos_token_id = None
        self.special_token_ids: list[int] = []
        # Special tokens have no text, so that no grammar allows them. Nor do those that end texts,
        # even if they are bytes.
        self.tokens = [
            tokenizer.token_bytes(i) if i in ids else b""
            for i in range(max(self.size, ends[-1] + 1))
        ]
        self._tokenizer = tokenizer
        wrapped = module.TokenizerWrapper(self)
        self._made: LLTokenizer = module.LLTokenizer(
            wrapped, n_vocab=len(self.tokens), eos_token=ends
        )

    def __call__(self, text: str) -> list[int]:
        """Encodes a text that a grammar fixes. llguidance requires this, but `_NO_FORCING`
        prevents its use."""
        return self._tokenizer.encode(text)

    def read(self, lark: str) -> "LLMatcher":
        """Reads a grammar.

        **Raises:** `ValueError` if it cannot be read.
        """
        module = _llguidance()
        source = module.LLMatcher.grammar_from_lark(lark + _NO_FORCING)
        matcher = module.LLMatcher(self._made, source, log_level=0, limits=_limits())
        if matcher.is_error():
            why = _shown(matcher.get_error())
            raise ValueError(f"The grammar cannot be read: {why}. Correct or simplify it.")
        return matcher


@functools.lru_cache(maxsize=4)
def _tokens(tokenizer: TextTokenizer | ByteTokenizer) -> _Tokens:
    return _Tokens(tokenizer)


@functools.cache
def _limits() -> "LLParserLimits":
    """Returns limits with which a mask takes some hundredths of a second at most."""
    return _llguidance().LLParserLimits(
        initial_lexer_fuel=300_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=20_000,
        max_grammar_size=50_000,
        verbose_errors=False,
    )


def _llguidance():  # noqa: ANN202 (a module)
    try:
        import llguidance
    except ImportError as error:
        raise ImportError(
            'Grammars require the package llguidance: pip install "mamba_eqx[structured]".'
        ) from error
    return llguidance


def _with_deep_stack(call: Callable[[], _Result]) -> _Result:
    """Calls a function in a thread with a large stack.

    llguidance follows references recursively. A stack that overflows would end the process, and
    threads have small stacks on some systems.
    """
    found: list[_Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            errors.append(error)

    with _STACK_LOCK:
        before = threading.stack_size(_STACK)
        try:
            thread = threading.Thread(target=run)
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]
    return found[0]


_STACK_LOCK = threading.Lock()


def _check_length(name: str, text: str) -> None:
    if len(text) > _LONGEST:
        raise ValueError(
            f"`{name}` must have at most {_LONGEST} characters, but has {len(text)}. Simplify it."
        )


def _intersections(schema: object) -> int:
    """Returns how many entries of `allOf` and `patternProperties` a schema has in all its parts."""
    if isinstance(schema, list):
        return sum(map(_intersections, schema))
    if not isinstance(schema, dict):
        return 0
    own = [schema.get(name) for name in ("allOf", "patternProperties")]
    count = sum(len(entries) for entries in own if isinstance(entries, dict | list))
    return count + sum(map(_intersections, schema.values()))


def _shown(message: str) -> str:
    """Returns the error of llguidance on one line, without the source that it quotes."""
    first = re.split(r"\n +1 \||\n<", message)[0]
    first = " ".join(re.sub(r"at 1\(8\): |failed to compile JSON schema: ", "", first).split())
    first = first.removesuffix(".")
    return first if len(first) <= _LONGEST_ERROR else first[: _LONGEST_ERROR - 3] + "..."
