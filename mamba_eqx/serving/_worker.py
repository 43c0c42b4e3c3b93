"""The thread that runs the engine, and the way from it to the handlers of requests."""

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from ..generation import Engine, FinishReason, Job, Progress
from ._errors import ApiError


LOG = logging.getLogger("mamba_eqx.server")
_MAX_QUESTIONS = 64  # that wait for the engine
_Answer = TypeVar("_Answer")


class News(NamedTuple):
    """What the thread tells about a job."""

    finish: FinishReason | None
    failed: bool


class Following:
    """A job, and the news about it for the event loop that submitted it."""

    def __init__(self, job: Job, loop: asyncio.AbstractEventLoop):
        self.job = job
        self._loop = loop
        self._news: asyncio.Queue[News] = asyncio.Queue()

    async def next(self) -> News:
        """Waits for news."""
        return await self._news.get()

    def tell(self, news: News) -> None:
        """Adds news, from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._news.put_nowait, news)
        except RuntimeError:  # The loop is closed.
            self.job.cancel()


class _Question(Generic[_Answer]):
    """A question to the engine, for the event loop that asked it."""

    def __init__(self, look: Callable[[Engine], _Answer]):
        self._look = look
        self._loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[_Answer] = self._loop.create_future()

    def put(self, engine: Engine | None) -> None:
        """Looks at the engine, or says that there is none. A fault is the asker's only."""
        try:
            if engine is None:
                raise ApiError(503, "The engine has failed. Restart the server.")
            found, error = self._look(engine), None
        except ApiError as raised:
            found, error = None, raised
        except Exception:
            LOG.exception("A look at the engine failed. Its texts go on.")
            found, error = None, ApiError(500, "The server has a fault. See its log.")
        with contextlib.suppress(RuntimeError):  # The loop is closed.
            self._loop.call_soon_threadsafe(self._tell, found, error)

    def _tell(self, found: Any, error: ApiError | None) -> None:
        if self.answer.done():  # The client is gone.
            return
        if error is None:
            self.answer.set_result(found)
        else:
            self.answer.set_exception(error)


class Worker:
    """Runs an engine in a thread of its own, which nothing that clients do can hold up."""

    def __init__(self, make_engine: Callable[[], Engine]):
        """**Arguments:**

        - `make_engine`: makes the engine, and a new one after a fault, whose states are lost.
        """
        self._make_engine = make_engine
        self.engine: Engine | None = make_engine()
        """The engine, or `None` while a new one is made and after that has failed."""
        self._followed: dict[Job, Following] = {}
        self._questions: deque[_Question[Any]] = deque()
        self._lock = threading.Condition()
        self._stopping = self._ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its current step."""
        with self._lock:
            self._stopping = True
            self._lock.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    async def submit(self, submits: Sequence[Callable[[Engine], Job]]) -> list[Following]:
        """Submits jobs, all or none, in a thread, so that the event loop goes on meanwhile.

        **Arguments:**

        - `submits`: each submits a job to the engine.

        **Returns:**

        The jobs, with their news.

        **Raises:** the errors of `follow`.
        """
        loop = asyncio.get_running_loop()
        gone = threading.Event()

        def submit_all() -> list[Following]:
            followed: list[Following] = []
            try:
                for submit in submits:
                    followed.append(self.follow(submit, loop=loop))
                    if gone.is_set():
                        break
            except BaseException:
                for following in followed:
                    following.job.cancel()
                raise
            return followed

        running = asyncio.ensure_future(asyncio.to_thread(submit_all))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:  # The client is gone, but the thread is not.
            gone.set()
            running.add_done_callback(_cancel_jobs)
            raise

    def follow(
        self, submit: Callable[[Engine], Job], *, loop: asyncio.AbstractEventLoop | None = None
    ) -> Following:
        """Submits a job.

        **Arguments:**

        - `submit`: submits the job to the engine.
        - `loop`: the event loop that takes the news, by default the running one.

        **Returns:**

        The job, with its news.

        **Raises:** the errors of `submit`; `ApiError` if there is no engine.
        """
        loop = asyncio.get_running_loop() if loop is None else loop
        with self._lock:
            if self.engine is None:
                remedy = "Try again in a minute." if self.alive else "Restart the server."
                raise ApiError(503, f"The engine has failed. {remedy}")
            following = Following(submit(self.engine), loop)
            self._followed[following.job] = following
            self._lock.notify()
        return following

    async def ask(self, look: Callable[[Engine], _Answer]) -> _Answer:
        """Looks at the engine in its thread, between two steps, and returns what `look` returns.

        One look fits between two steps, so that however many clients ask, texts go on.

        **Raises:** `ApiError` if too many looks wait, if there is no engine, or if `look` fails.
        """
        question = _Question(look)
        with self._lock:
            if len(self._questions) >= _MAX_QUESTIONS:
                raise ApiError(
                    503,
                    "Too many clients look at states. Try again in a moment.",
                    headers={"Retry-After": "1"},
                )
            if self._ended:
                raise ApiError(503, "The engine has failed. Restart the server.")
            self._questions.append(question)
            self._lock.notify()
        return await question.answer

    def _run(self) -> None:
        try:
            self._work()
        finally:
            with self._lock:
                self._ended = True
                left, self._questions = self._questions, deque()
            for question in left:
                question.put(None)

    def _work(self) -> None:
        while (engine := self._wait()) is not None:
            with self._lock:
                question = self._questions.popleft() if self._questions else None
            if question is not None:
                question.put(engine)
            del question
            try:
                for progress in engine.step() if engine.busy else ():
                    self._tell(progress)
                continue
            except Exception:
                LOG.exception("The engine failed. All its requests end, and a new one begins.")
            del engine  # The memory of the old engine is free before the new one is made.
            with self._lock:
                lost, self._followed, self.engine = self._followed, {}, None
            for following in lost.values():
                following.tell(News(None, failed=True))
            try:
                made = self._make_engine()
            except Exception:
                LOG.exception("No new engine could be made. Restart the server.")
                return
            with self._lock:
                self.engine = made
            del made

    def _wait(self) -> Engine | None:
        """Waits for work, and returns the engine that has it, or `None` to stop."""
        with self._lock:
            while self.engine is not None and not self._has_work(self.engine):
                self._lock.wait()
            return None if self._stopping else self.engine

    def _has_work(self, engine: Engine) -> bool:
        return engine.busy or bool(self._questions) or self._stopping

    def _tell(self, progress: Progress) -> None:
        with self._lock:
            following = self._followed.get(progress.job)
            if progress.finish is not None:
                self._followed.pop(progress.job, None)
        if following is not None:
            following.tell(News(progress.finish, failed=False))


def _cancel_jobs(submitted: asyncio.Future[list[Following]]) -> None:
    """Cancels jobs that nobody follows any more."""
    if not submitted.cancelled() and submitted.exception() is None:
        for following in submitted.result():
            following.job.cancel()
