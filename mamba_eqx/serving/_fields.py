"""Reading the body of a request, and its fields."""

import json
import math
from collections.abc import Collection, Mapping

from ._aiohttp import web
from ._errors import ApiError, invalid


async def read_json(request: web.Request) -> dict[str, object]:
    """Returns the body of a request, a JSON object in UTF-8.

    **Raises:** `ApiError` for another body; `ConnectionResetError` if the client is gone.
    """
    if request.content_type != "application/json":
        raise invalid("The Content-Type must be application/json.")
    charset = request.charset
    if "Content-Encoding" in request.headers or (charset or "utf-8").lower() != "utf-8":
        raise invalid("The body must be JSON in UTF-8, without compression.")
    try:
        data = await request.read()
    except web.RequestPayloadError:
        raise invalid("The body of the request is damaged.") from None
    except web.HTTPRequestEntityTooLarge as error:
        raise ApiError(413, f"The body is too large. {error.text}") from None
    except RuntimeError as error:  # aiohttp raises it if the client is gone.
        if request.transport is None:
            raise ConnectionResetError("The client is gone.") from error
        raise
    try:
        found = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise invalid("The body must be JSON in UTF-8.") from None
    if not isinstance(found, dict):
        raise invalid("The body must be a JSON object.")
    return found


class Fields:
    """The fields of a JSON object. A field that is null counts as missing."""

    def __init__(self, body: Mapping[str, object]):
        self._body = {name: value for name, value in body.items() if value is not None}

    def check_names(self, known: Collection[str]) -> None:
        """Refuses a request with a field that would have no effect."""
        for name in self._body:
            if name not in known:
                raise invalid(f"There is no field {_shown(name)}. Leave it out.", _param(name))

    def has(self, name: str) -> bool:
        return name in self._body

    def names(self) -> list[str]:
        return list(self._body)

    def value(self, name: str) -> object:
        return self._body.get(name)

    def integer(self, name: str, default: int | None, low: int, high: int) -> int:
        """Returns an integer within `low..high`. It is required if there is no default."""
        value = self._body.get(name, default)
        if type(value) is not int or not low <= value <= high:
            raise invalid(
                f"`{name}` must be an integer within {low}..{high}, but got {_shown(value)}.", name
            )
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """Returns a number within `low..high`."""
        value = self._body.get(name, default)
        fits = type(value) in (int, float) and low <= value <= high  # pyright: ignore
        if not fits or not isinstance(value, int | float) or not math.isfinite(value):
            raise invalid(
                f"`{name}` must be a number within {low:g}..{high:g}, but got {_shown(value)}.",
                name,
            )
        return float(value)

    def flag(self, name: str) -> bool:
        """Returns a boolean, by default false."""
        value = self._body.get(name, False)
        if not isinstance(value, bool):
            raise invalid(f"`{name}` must be true or false, but got {_shown(value)}.", name)
        return value

    def group(self, name: str) -> "Fields":
        """Returns a JSON object, by default an empty one."""
        value = self._body.get(name, {})
        if not isinstance(value, dict):
            raise invalid(f"`{name}` must be an object, but got {_shown(value)}.", name)
        return Fields(value)

    def only(self, name: str, allowed: object) -> None:
        """Refuses any other value than the one that changes nothing."""
        value = self._body.get(name, allowed)
        if type(value) is not type(allowed) or value != allowed:
            raise invalid(
                f"`{name}` must be {json.dumps(allowed)} here, but got {_shown(value)}.", name
            )


def check_text(name: str, value: object) -> str:
    """Returns a text that UTF-8 can encode."""
    if not isinstance(value, str):
        raise invalid(f"`{name}` must be text, but got {_shown(value)}.", name)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise invalid(
            f"`{name}` must not have surrogates, which are no characters.", name
        ) from None
    return value


def _shown(value: object) -> str:
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."


def _param(name: str) -> str:
    return name if len(name) <= 60 else name[:60]
