"""The handlers of OpenAI's API."""

import asyncio
import functools
import json
import math
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TypeVar

import jax.random as jr

from ..generation import Engine, EngineFullError, FinishReason, Job
from ._aiohttp import web
from ._asked import Asked, Prompt, read_chat, read_completion
from ._connections import Connections
from ._errors import ApiError
from ._fields import read_json
from ._forms import Chat, Completion, Form
from ._served import Served
from ._texts import Shown, Text
from ._worker import Following, Worker


_LONGEST_WAIT = 60  # seconds, the most that a full server asks clients to wait


class Durations:
    """How long requests took lately, from which a full server says when to come again."""

    def __init__(self):
        self._last: deque[float] = deque(maxlen=32)

    def add(self, seconds: float) -> None:
        self._last.append(seconds)

    def retry_after(self) -> int:
        """Returns a number of seconds."""
        mean = sum(self._last) / len(self._last) if self._last else 1.0
        return max(1, min(_LONGEST_WAIT, math.ceil(mean)))


class OpenAI:
    """The endpoints of OpenAI's API for one model."""

    def __init__(
        self,
        served: Served,
        worker: Worker,
        connections: Connections,
        note: Callable[[str, Job], None],
    ):
        """**Arguments:**

        - `served`: the model.
        - `worker`: the engine's thread.
        - `connections`: the connections of clients.
        - `note`: takes the ids of answers, each with the job of its first choice.
        """
        self._served, self._worker, self._connections = served, worker, connections
        self._note = note
        self.durations = Durations()
        self.refused = 0

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/models", self._models),
            web.get("/v1/models/{name:.+}", self._model),
            web.post("/v1/completions", self._completions),
            web.post("/v1/chat/completions", self._chat),
        ]

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._described()]})

    async def _model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name != self._served.name:
            raise ApiError(
                404,
                f"There is no model {name[:60]!r} here. Use {self._served.name!r}.",
                code="model_not_found",
            )
        return web.json_response(self._described())

    def _described(self) -> dict[str, object]:
        served = self._served
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "mamba_eqx",
            "max_model_len": served.max_len,
            "has_chat_template": served.has_template,
        }

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, read_completion, Completion)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, read_chat, Chat)

    async def _answer(
        self,
        request: web.Request,
        read: Callable[[Mapping[str, object], Served], Asked],
        form: Callable[[str], Form],
    ) -> web.StreamResponse:
        body = await read_json(request)
        self._connections.work(request)
        asked = await asyncio.to_thread(read, body, self._served)
        start = asyncio.get_running_loop().time()
        followed = await self.submit(asked)
        try:
            texts = [
                Text(following.job, self._served.tokenizer, asked.stops, asked.log_probs)
                for following in followed
            ]
            answer = form(self._served.name)
            if not asked.log_probs:  # A kept job would keep its long lists of tokens too.
                self._note(answer.id, followed[0].job)
            if asked.stream:
                return await self._stream(request, asked, answer, texts, followed)
            return await self._whole(asked, answer, texts, followed)
        finally:
            # A client that is gone, or a stop string, ends jobs that still run.
            for following in followed:
                following.job.cancel()
            self.durations.add(asyncio.get_running_loop().time() - start)

    async def submit(self, asked: Asked) -> list[Following]:
        """Submits a job for each choice, or none.

        **Raises:** `ApiError` if the server is full, or has no engine.
        """

        def submit(engine: Engine, i: int, prompt: Prompt) -> Job:
            return engine.submit(
                prompt=prompt.ids,
                max_new_tokens=asked.max_new_tokens,
                sampling=asked.sampling,
                key=jr.fold_in(jr.key(asked.seed), i),
                seconds=self._served.seconds,
                top_log_probs=bool(asked.log_probs),
                keep=prompt.keep,
            )

        places = [prompt for prompt in asked.prompts for _ in range(asked.n)]
        submits = [functools.partial(submit, i=i, prompt=p) for i, p in enumerate(places)]
        try:
            return await self._worker.submit(submits)
        except EngineFullError:
            self.refused += 1
            raise ApiError(
                503,
                "The server is full. Try again in a moment.",
                code="server_full",
                headers={"Retry-After": str(self.durations.retry_after())},
            ) from None

    async def _whole(
        self, asked: Asked, answer: Form, texts: Sequence[Text], followed: Sequence[Following]
    ) -> web.Response:
        async def collect(i: int) -> dict[str, object]:
            pieces: list[str] = []
            shown: list[Shown] = []
            while texts[i].finish is None:
                piece, more = await _next(texts[i], followed[i])
                pieces.append(piece)
                shown += more
            found = None if asked.log_probs is None else shown
            return answer.choice(i, "".join(pieces), found, texts[i].finish)

        choices = await _all([collect(i) for i in range(len(texts))])
        usage = _usage(texts, asked.n)
        return web.json_response(answer.whole(choices, usage))

    async def _stream(
        self,
        request: web.Request,
        asked: Asked,
        answer: Form,
        texts: Sequence[Text],
        followed: Sequence[Following],
    ) -> web.StreamResponse:
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        response = web.StreamResponse(headers=headers)
        turn = asyncio.Lock()  # Choices write one after another.

        async def send(value: Mapping[str, object] | str) -> None:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            async with turn:
                await self._connections.write(request, response, f"data: {text}\n\n".encode())

        async def stream(i: int) -> None:
            first = True
            while texts[i].finish is None:
                piece, shown = await _next(texts[i], followed[i])
                if first and (begin := answer.begin(i)) is not None:
                    await send(answer.piece([begin]))
                first = False
                if piece or shown or texts[i].finish is not None:
                    found = None if asked.log_probs is None else shown
                    await send(answer.piece([answer.delta(i, piece, found, texts[i].finish)]))

        try:
            await _all([stream(i) for i in range(len(texts))])
            if asked.usage:
                await send(answer.piece([], _usage(texts, asked.n)))
            await send("[DONE]")
        except ApiError as error:
            if not response.prepared:
                raise
            await send(error.body())
        return response


async def _next(text: Text, following: Following) -> tuple[str, list[Shown]]:
    """Waits for more of a text.

    **Raises:** `ApiError` if the text cannot go on.
    """
    news = await following.next()
    if news.failed:
        raise ApiError(500, "The server has a fault. See its log, and try again.")
    if news.finish == FinishReason.NOT_FINITE:
        raise ApiError(
            500,
            "The model's logits are NaN or infinite, so that no token can be chosen. Check its "
            "weights.",
        )
    if news.finish == FinishReason.CONSTRAINT_FAILED:
        raise ApiError(400, f"The text cannot go on in the given format. {text.job.error}")
    found = text.take(news.finish)
    if text.finish is not None and news.finish is None:
        following.job.cancel()  # A stop string ends it early.
    if news.finish is not None and text.finish is None:
        raise ApiError(500, "The request was cancelled. Try again.")
    return found


_Result = TypeVar("_Result")


async def _all(tasks: Sequence[Coroutine[None, None, _Result]]) -> list[_Result]:
    """Awaits all tasks. The first error cancels the others, and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            made = [group.create_task(task) for task in tasks]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in made]


def _usage(texts: Sequence[Text], n: int) -> dict[str, object]:
    prompt = sum(len(text.job.prompt) for text in texts[::n])
    new = sum(text.read for text in texts)
    cached = sum(text.job.reused for text in texts[::n])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
