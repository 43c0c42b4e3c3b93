"""The server behind `mamba-eqx serve`. It requires aiohttp, which the extra `serve` installs."""

from ._connections import is_loopback as is_loopback, start_log as start_log
from ._served import Served as Served
from ._server import Server as Server


__all__: list[str] = []  # Nothing is public: users run the command.
