"""The page, a client of OpenAI's API in the browser, and the recurrent states that it shows."""

import asyncio
import base64
import math
from collections import OrderedDict
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from ..generation import Job
from ..layers import KVCache, Mamba1State, Mamba2State, Mamba3State
from ._aiohttp import web
from ._errors import ApiError
from ._fields import Fields, read_json
from ._served import Served
from ._worker import Worker


_FOLDER = Path(__file__).with_name("page")
_INDEX = "index.html"
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# The page can neither load nor run anything from other servers, nor anything written into it.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_WIDTH = 64  # Channels in a picture.
_HEIGHT = 16  # State dimensions in a picture.
_MAX_ENDED = 16  # Texts that have ended, whose states can still be asked for.


class Page:
    """The page, and its endpoint for the states of texts.

    A text is known by the id of its answer, which only its own client has been told.
    """

    def __init__(self, served: Served, worker: Worker):
        self._served, self._worker = served, worker
        self._jobs: OrderedDict[str, Job] = OrderedDict()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/", self._file),
            web.get("/page/{name}", self._file),
            web.post("/state", self._state),
        ]

    def note(self, name: str, job: Job) -> None:
        """Keeps a job, whose state can be asked for by the id of its answer. Drops old ones."""
        self._jobs[name] = job
        while len(self._jobs) > self._served.slots + self._served.queue + _MAX_ENDED:
            self._jobs.popitem(last=False)

    async def _file(self, request: web.Request) -> web.Response:
        """Returns a file of the page."""
        name = request.match_info.get("name", _INDEX)
        # Names are compared with those in the folder, so that no path leads out of it.
        path = next((path for path in _FOLDER.iterdir() if path.name == name), None)
        kind = None if path is None else _KINDS.get(path.suffix)
        if path is None or kind is None:
            raise ApiError(404, "There is no such file.")
        text = path.read_text("utf-8")
        return web.Response(text=text, content_type=kind, charset="utf-8", headers=_HEADERS)

    async def _state(self, request: web.Request) -> web.Response:
        """Returns the numbers of tokens of a text, and its state if there is one now."""
        fields = Fields(await read_json(request))
        fields.check_names(["id"])
        name = fields.value("id")
        job = self._jobs.get(name) if isinstance(name, str) else None
        if job is None:
            raise ApiError(404, "There is no such text now: only the latest ones are kept.")
        state = await self._worker.ask(lambda engine: engine.state(job))
        layers = None if state is None else await asyncio.to_thread(pictures, state.layers)
        found = {
            "prompt_tokens": len(job.prompt),
            "cached_tokens": job.reused,
            "saved_seconds": job.saved_seconds,
            "new_tokens": len(job.tokens),
            "layers": layers,
        }
        return web.json_response(found)


def pictures(layers: PyTree) -> list[dict[str, object]]:
    """Returns the hidden state of each mixer, in the order of the layers.

    Each has its kind, its size in bytes, its norm, and pixels of one byte each in Base64, in which
    128 is zero.
    """
    found: list[dict[str, object]] = []
    for layer in jax.tree.leaves(layers, is_leaf=_is_known):
        if not _is_known(layer):
            continue
        shown = _shown(layer)
        if shown.size == 0:
            continue
        # Each mixer has its own scale.
        scale = np.abs(shown).mean() * 2 + 1e-9
        pixels = np.round(128 + 127 * np.tanh(np.nan_to_num(shown / scale))).astype(np.uint8)
        found.append(
            {
                "kind": "attention" if isinstance(layer, KVCache) else "state space",
                "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(layer)),
                "norm": float(np.nan_to_num(_norm(_hidden(layer)))),
                "shape": pixels.shape,
                "pixels": base64.b64encode(pixels.tobytes()).decode(),
            }
        )
    return found


def _is_known(tree: object) -> bool:
    """Returns whether a subtree is the state of a mixer that can be drawn."""
    return isinstance(tree, Mamba1State | Mamba2State | Mamba3State | KVCache)


def _shown(layer: PyTree) -> np.ndarray:
    """Returns a part of the hidden state of a layer as a matrix of state dimensions and channels.

    The state of attention is the keys of the last tokens: a row for each token.
    """
    match layer:
        case Mamba3State():
            return np.asarray(_thinned(layer.ssm, -1), np.float32)
        case KVCache():
            room = layer.k.shape[-2]
            known = min(int(np.max(layer.length)), room)  # One for each of stacked layers.
            begin = jnp.asarray(max(0, known - _HEIGHT), jnp.int32)
            return np.asarray(_last(layer.k, begin), np.float32)[:known]
        case _:
            return np.asarray(_thinned(layer.ssm, 0), np.float32)


def _hidden(layer: PyTree) -> PyTree:
    """Returns the arrays of a state that are its hidden state."""
    return (layer.k, layer.v) if isinstance(layer, KVCache) else layer.ssm


@jax.jit
def _norm(hidden: PyTree) -> Float[Array, ""]:
    """Returns the Euclidean norm of all numbers together."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(hidden)]
    return jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))


# The device returns what is shown only.
@eqx.filter_jit
def _thinned(hidden: Float[Array, "..."], axis: int) -> Float[Array, "rows columns"]:
    """Returns some rows and columns of a state, whose rows are along `axis`."""
    hidden = jnp.moveaxis(hidden, axis, 0)
    hidden = hidden.reshape(len(hidden), math.prod(hidden.shape[1:]))
    rows, columns = hidden.shape
    return hidden[:: max(1, -(-rows // _HEIGHT)), :: max(1, columns // _WIDTH)][:, :_WIDTH]


@eqx.filter_jit
def _last(
    keys: Float[Array, "*heads room headdim"], begin: Int[Array, ""]
) -> Float[Array, "rows columns"]:
    """Returns some columns of the keys from the token `begin` on."""
    size = min(_HEIGHT, keys.shape[-2])
    return _thinned(lax.dynamic_slice_in_dim(keys, begin, size, axis=-2), -2)
