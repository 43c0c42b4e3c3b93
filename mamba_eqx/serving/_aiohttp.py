"""The import of aiohttp, which the extra `serve` installs."""

try:
    from aiohttp import web as web
except ImportError as error:
    raise ImportError(
        'The server requires the package aiohttp: pip install "mamba_eqx[serve]".'
    ) from error
