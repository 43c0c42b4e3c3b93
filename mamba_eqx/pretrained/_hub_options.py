"""The options for access to the Hub."""

import base64
import dataclasses
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from ..formats import quote
from ._hub_errors import hide_secrets


# The characters of a token in an HTTP header, as RFC 6750 defines them and a few more.
_TOKEN = re.compile(r"[!-~]+")
# Shorter ones are no secrets, and would be found in the words of a message.
_SHORTEST_SECRET = 8
_NO_REVISION = re.compile(r"[\0-\x1f\x7f\\]")


@dataclasses.dataclass(frozen=True)
class Hub:
    """The options for access to the Hub, with the names that `huggingface_hub` uses.

    See [`mamba_eqx.from_pretrained`][] for their meanings. The token and the endpoint, which may
    contain a password, are left out of the `repr`.
    """

    revision: str | None = None
    token: str | bool | None = dataclasses.field(default=None, repr=False)
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    force_download: bool = False
    endpoint: str | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self):
        if self.force_download and self.local_files_only:
            raise ValueError(
                "`force_download` and `local_files_only` exclude each other. Set only one of them."
            )
        if isinstance(self.token, str):
            object.__setattr__(self, "token", _clean_token(self.token))
        if self.revision is not None:
            _check_revision(self.revision)
        if self.endpoint is not None:
            _split_endpoint("`endpoint`", self.endpoint)

    @property
    def cache(self) -> Path:
        """The folder for downloads."""
        from huggingface_hub import constants

        folder = constants.HF_HUB_CACHE if self.cache_dir is None else self.cache_dir
        return Path(folder).expanduser()

    @property
    def offline(self) -> bool:
        """Whether only the cache may be used."""
        from huggingface_hub import constants

        return self.local_files_only or constants.HF_HUB_OFFLINE

    @property
    def address(self) -> str:
        """The address of the Hub, without the name and password that `endpoint` may contain."""
        return self._endpoint()[0]

    @property
    def shown_endpoint(self) -> str | None:
        """The address of the Hub for messages, or `None` for the usual one."""
        return None if self.endpoint is None else self.address

    @property
    def secrets(self) -> list[str]:
        """The given token, and the password of the endpoint as it is sent, for messages to hide."""
        password = [value.removeprefix("Basic ") for value in self.password_header().values()]
        given = [self.token, *password] if isinstance(self.token, str) else password
        return [secret for secret in given if len(secret) >= _SHORTEST_SECRET]

    def headers(self) -> dict[str, str]:
        """Returns the headers of a request, with the token or the password."""
        from huggingface_hub.utils import build_hf_headers

        password = self.password_header()
        headers = build_hf_headers(token=False if password else self.token)
        return headers | {"Accept-Encoding": "identity"} | password

    def password_header(self) -> dict[str, str]:
        """Returns the header with the name and password of `endpoint`, if there are any.

        A password stays out of the address, because `huggingface_hub` logs addresses.
        """
        _, password = self._endpoint()
        return {} if password is None else {"authorization": password}

    def _endpoint(self) -> tuple[str, str | None]:
        from huggingface_hub import constants

        if self.endpoint is not None:
            return _split_endpoint("`endpoint`", self.endpoint)
        return _split_endpoint("The environment variable `HF_ENDPOINT`", constants.ENDPOINT)


def _clean_token(token: str) -> str:
    """Strips white space, such as the end of the line that a token was read from.

    **Raises:** `ValueError`, whose message does not contain the token.
    """
    token = token.strip()
    if not _TOKEN.fullmatch(token):
        raise ValueError(
            "`token` must be the letters and digits of an access token, but the given one is empty "
            "or has white space or other characters within. Copy it again, or use `token=False` "
            "for none."
        )
    return token


def _check_revision(revision: object) -> None:
    """Raises unless a revision can be the name of a branch, tag or commit.

    The cache has a file of that name, which must not be outside the cache.
    """
    valid = isinstance(revision, str) and not _NO_REVISION.search(revision)
    if not valid or any(part in ("", ".", "..") for part in str(revision).split("/")):
        raise ValueError(
            "`revision` must be the name of a branch, a tag or a commit, but got "
            f"{quote(str(revision))}."
        )


def _split_endpoint(name: str, endpoint: str) -> tuple[str, str | None]:
    """Splits the address of a Hub into the address alone and a header with its password."""
    try:
        parts = urlsplit(endpoint.strip().rstrip("/"))
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        valid = valid and (parts.port is None or parts.port > 0)
    except ValueError:  # From a port or brackets that are not valid.
        valid, parts = False, None
    if not valid or parts is None or re.search(r"[\s\0-\x1f]", endpoint.strip()):
        raise ValueError(
            f"{name} must be the address of a Hub, such as https://huggingface.co, but got "
            f"{quote(hide_secrets(endpoint))}."
        )
    user, _, host = parts.netloc.rpartition("@")
    address = urlunsplit((parts.scheme, host, parts.path, "", ""))
    if not user:
        return address, None
    encoded = base64.b64encode(unquote(user).encode()).decode()
    return address, f"Basic {encoded}"
