"""Requests for texts, as OpenAI's API describes them, read and validated."""

import dataclasses
import json
import secrets
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ..generation import Sampling
from ..generation.sampling import Penalties
from ..text import TextTokenizer, chat_tokenizer
from ._errors import ApiError, invalid
from ._fields import Fields, check_text
from ._served import Served
from ._structured import read_format


_MAX_CHOICES = 64
_MAX_STOPS = 16
_TOP = 20
_MAX_STOP_LENGTH = 256
_MAX_MESSAGES = 1024
_MAX_CHAT = 2**18  # characters of all messages, as JSON
_TINY = float(np.finfo(np.float32).tiny)
_INT32 = 2**31 - 1
# Fields of any request. Those of the last line say something about the client, and have no effect.
_FIELDS = {
    *("model", "max_tokens", "n", "seed", "stream", "stream_options", "stop", "logprobs"),
    *("temperature", "top_p", "top_k", "min_p", "typical_p", "logit_bias"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("response_format", "structured_outputs"),
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
}
_COMPLETION = {"prompt", "echo", "best_of", "suffix"}
_CHAT = {
    *("messages", "max_completion_tokens", "top_logprobs"),
    *("tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs"),
}


class Prompt(NamedTuple):
    """The token ids of a prompt, and numbers of its tokens after which states are kept."""

    ids: list[int]
    keep: list[int]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request for texts."""

    prompts: list[Prompt]
    n: int
    max_new_tokens: int
    sampling: Sampling
    stops: list[str]
    seed: int
    log_probs: int | None
    """The number of most likely tokens to show with each token; `None` shows no probabilities."""
    stream: bool
    usage: bool
    """Whether a stream ends with the numbers of tokens."""


def read_completion(body: Mapping[str, object], served: Served) -> Asked:
    """Reads a request of `/v1/completions`."""
    fields = Fields(body)
    fields.check_names(_FIELDS | _COMPLETION)
    fields.only("echo", False)
    fields.only("suffix", "")
    prompts = [Prompt(ids, []) for ids in _prompts(fields.value("prompt"), served)]
    log_probs = fields.integer("logprobs", 0, 0, 5) if fields.has("logprobs") else None
    asked = _read(fields, served, prompts, log_probs, default_max=16)
    fields.only("best_of", asked.n)
    return asked


def read_chat(body: Mapping[str, object], served: Served) -> Asked:
    """Reads a request of `/v1/chat/completions`."""
    fields = Fields(body)
    fields.check_names(_FIELDS | _CHAT)
    fields.only("tools", [])
    fields.only("tool_choice", "none")
    fields.only("parallel_tool_calls", True)
    prompt = _chat_prompt(fields, served)
    log_probs = fields.integer("top_logprobs", 0, 0, _TOP)
    if not fields.flag("logprobs"):
        if log_probs:
            raise invalid("`top_logprobs` must come with `logprobs: true`.", "top_logprobs")
        log_probs = None
    return _read(fields, served, [prompt], log_probs, default_max=None)


def _read(
    fields: Fields,
    served: Served,
    prompts: list[Prompt],
    log_probs: int | None,
    *,
    default_max: int | None,
) -> Asked:
    _check_model(fields, served)
    n = fields.integer("n", 1, 1, _MAX_CHOICES)
    most = min(_MAX_CHOICES, served.slots + served.queue)
    if n * len(prompts) > most:
        raise invalid(
            f"`n` times the number of prompts must be at most {most}, but got {n} times "
            f"{len(prompts)}.",
            "n",
        )
    room = served.max_len - max(len(prompt.ids) for prompt in prompts)
    if room < 1:
        raise ApiError(
            400,
            f"The prompt must have fewer than {served.max_len} tokens, but has "
            f"{served.max_len - room}. Shorten it.",
            code="context_length_exceeded",
        )
    name = "max_completion_tokens" if fields.has("max_completion_tokens") else "max_tokens"
    if fields.has("max_completion_tokens") and fields.has("max_tokens"):
        limits = [fields.value("max_completion_tokens"), fields.value("max_tokens")]
        if limits[0] != limits[1]:
            raise invalid(
                "`max_tokens` must equal `max_completion_tokens`, its newer name, if both are "
                "given. Give `max_completion_tokens` only.",
                "max_tokens",
            )
    default = room if default_max is None else min(room, default_max)
    count = fields.integer(name, default, 1, _INT32)
    if count > room:
        raise ApiError(
            400,
            f"The prompt and `{name}` must be at most {served.max_len} tokens together, but are "
            f"{served.max_len - room} and {count}. Ask for fewer tokens.",
            param=name,
            code="context_length_exceeded",
        )
    stream = fields.flag("stream")
    options = fields.group("stream_options")
    options.check_names(["include_usage", "include_obfuscation"])
    if fields.has("stream_options") and not stream:
        raise invalid("`stream_options` must come with `stream: true`.", "stream_options")
    return Asked(
        prompts=prompts,
        n=n,
        max_new_tokens=count,
        sampling=_sampling(fields, served),
        stops=_stops(fields.value("stop")),
        seed=fields.integer("seed", secrets.randbits(32), -(2**63), 2**63 - 1) % 2**32,
        log_probs=log_probs,
        stream=stream,
        usage=options.flag("include_usage"),
    )


def _check_model(fields: Fields, served: Served) -> None:
    name = fields.value("model")
    if not isinstance(name, str):
        raise invalid(f"`model` must be the name of a model, here {served.name!r}.", "model")
    if name != served.name:
        raise ApiError(
            404,
            f"There is no model {name[:60]!r} here. Use {served.name!r}.",
            param="model",
            code="model_not_found",
        )


def _sampling(fields: Fields, served: Served) -> Sampling:
    temperature = fields.number("temperature", 1.0, 0.0, 10.0)
    if 0 < temperature < _TINY:
        raise invalid(f"`temperature` must be 0, or at least {_TINY:.2g}.", "temperature")
    top_p = fields.number("top_p", 1.0, 0.0, 1.0)
    presence = fields.number("presence_penalty", 0.0, -2.0, 2.0)
    frequency = fields.number("frequency_penalty", 0.0, -2.0, 2.0)
    repetition = fields.number("repetition_penalty", 1.0, 0.01, 100.0)
    top_k = fields.integer("top_k", 0, 0, _INT32)
    min_p = fields.number("min_p", 0.0, 0.0, 1.0)
    typical_p = fields.number("typical_p", 1.0, 1e-6, 1.0)
    penalties = None
    if (presence, frequency, repetition) != (0, 0, 1):
        penalties = Penalties(repetition, presence, frequency)
    # OpenAI's clients write 0 for a `top_p` that keeps the most likely token only.
    options = Sampling(
        temperature=temperature,
        top_k=top_k or None,
        top_p=None if top_p == 1 else max(top_p, 1e-6),
        min_p=min_p or None,
        typical_p=None if typical_p == 1 else typical_p,
        penalties=penalties,
        logit_bias=_bias(fields, served),
        constraint=read_format(fields, served),
    )
    return options.for_model(served.model, served.tokenizer)


def _bias(fields: Fields, served: Served) -> dict[int, float] | None:
    given = fields.group("logit_bias")
    bias: dict[int, float] = {}
    for name in given.names():
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            raise invalid("The keys of `logit_bias` must be token ids.", "logit_bias")
        token = int(name)
        if token >= served.model.vocab_size:
            raise invalid(
                f"The keys of `logit_bias` must be at most {served.model.vocab_size - 1}, but got "
                f"{token}.",
                "logit_bias",
            )
        bias[token] = given.number(name, 0.0, -100.0, 100.0)
    return bias or None


def _stops(value: object) -> list[str]:
    found = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(found, list) or len(found) > _MAX_STOPS:
        raise invalid(f"`stop` must be a text, or a list of at most {_MAX_STOPS} texts.", "stop")
    stops = [check_text("stop", stop) for stop in found]
    if any(not 0 < len(stop) <= _MAX_STOP_LENGTH for stop in stops):
        raise invalid(f"Each `stop` must have 1 to {_MAX_STOP_LENGTH} characters.", "stop")
    return stops


def _prompts(value: object, served: Served) -> list[list[int]]:
    """Reads a text, a list of texts, a list of token ids, or a list of such lists."""
    if isinstance(value, str):
        return [served.encode(check_text("prompt", value))]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [_token_ids(value, served)]
        if all(isinstance(item, str | list) for item in value):
            if len(value) > _MAX_CHOICES:
                raise invalid(f"There must be at most {_MAX_CHOICES} prompts.", "prompt")
            return [
                served.encode(check_text("prompt", item))
                if isinstance(item, str)
                else _token_ids(item, served)
                for item in value
            ]
    raise invalid("`prompt` must be a text, a list of token ids, or a list of these.", "prompt")


def _token_ids(value: list[object], served: Served) -> list[int]:
    ids = [item for item in value if type(item) is int]
    if not ids or len(ids) != len(value) or min(ids) < 0:
        raise invalid("`prompt` must have token ids, which are integers of at least 0.", "prompt")
    return served.check_tokens(ids, "prompt")


def _chat_prompt(fields: Fields, served: Served) -> Prompt:
    tokenizer = chat_tokenizer(served.tokenizer)
    if tokenizer is None:
        raise invalid(
            "This model has no chat template, since it was not trained on conversations. Use "
            "/v1/completions."
        )
    value = fields.value("messages")
    if not isinstance(value, list) or not value:
        raise invalid("`messages` must be a list of at least one message.", "messages")
    messages: list[Mapping[str, object]] = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise invalid("Each message must have a `role` and a `content`.", "messages")
        messages.append(message)
    if len(messages) > _MAX_MESSAGES:
        raise invalid(
            f"There must be at most {_MAX_MESSAGES} messages, but got {len(messages)}. Drop the "
            "oldest.",
            "messages",
        )
    size = len(json.dumps(messages))
    if size > _MAX_CHAT:
        raise invalid(
            f"`messages` must have at most {_MAX_CHAT} characters as JSON, but have {size}. "
            "Shorten them.",
            "messages",
        )
    options = fields.value("chat_template_kwargs")
    if options is not None and not isinstance(options, dict):
        raise invalid("`chat_template_kwargs` must be an object.", "chat_template_kwargs")
    try:
        ids = tokenizer.encode_chat(messages, options=options)
    except ValueError as error:
        raise invalid(str(error), "messages") from None
    if not ids:
        raise invalid("The chat template gives no tokens for these messages.", "messages")
    keep = _turns(tokenizer, messages, options, ids)
    return Prompt(served.check_tokens(ids, "messages"), keep)


def _turns(
    tokenizer: TextTokenizer,
    messages: list[Mapping[str, object]],
    options: dict[str, object] | None,
    ids: list[int],
) -> list[int]:
    """Returns after how many tokens the system's message ends, which other conversations share."""
    if len(messages) < 2 or messages[0]["role"] not in ("system", "developer"):
        return []
    try:
        head = tokenizer.encode_chat(messages[:1], add_generation_prompt=False, options=options)
    except ValueError:  # Some templates refuse a conversation without a user.
        return []
    same = 0
    for a, b in zip(head, ids, strict=False):
        if a != b:
            break
        same += 1
    return [same] if same else []
