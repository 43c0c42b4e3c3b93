"""The thread of the engine: its faults end no more than they must, and nobody waits for ever."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest

import mamba_eqx as mbx
from mamba_eqx.generation import Engine, FinishReason, Job
from tests.support.commands import byte_model


pytest.importorskip("aiohttp", reason="needs aiohttp: the extra `serve`")
pytestmark = pytest.mark.usefixtures("compile_fast", "as_users_run")

MODEL = byte_model()


def make_engine() -> Engine:
    return mbx.Engine(MODEL, slots=1, max_len=64, block=4)


def submit(engine: Engine) -> Job:
    return engine.submit([1, 2], 8)


class Faulty(Engine):
    """An engine whose steps fail."""

    def step(self) -> Any:
        raise RuntimeError("a fault on purpose")


def run(make: Callable[[], Engine], use: Callable[[Any], Any]) -> None:
    """Runs a test of a worker in an event loop."""
    from mamba_eqx.serving._worker import Worker

    async def main() -> None:
        worker = Worker(make)
        worker.start()
        try:
            await asyncio.wait_for(use(worker), 120)
        finally:
            worker.stop()

    asyncio.run(main())


async def finish(following: Any) -> FinishReason | None:
    """Returns how a job ended. The reason is `None` after a fault."""
    while True:
        news = await following.next()
        if news.failed or news.finish is not None:
            return news.finish


def test_jobs_of_a_lost_engine_end_and_a_new_engine_takes_others():
    engines = iter([Faulty(MODEL, slots=1, max_len=64), make_engine()])

    async def use(worker: Any) -> None:
        assert await finish(worker.follow(submit)) is None
        while worker.engine is None:
            await asyncio.sleep(0.01)
        assert await finish(worker.follow(submit)) == FinishReason.LENGTH

    run(lambda: next(engines), use)


def test_without_an_engine_requests_are_refused():
    from mamba_eqx.serving._errors import ApiError

    engines = [Faulty(MODEL, slots=1, max_len=64)]

    async def use(worker: Any) -> None:
        assert await finish(worker.follow(submit)) is None
        while worker.alive:
            await asyncio.sleep(0.01)
        with pytest.raises(ApiError, match="Restart the server") as caught:
            worker.follow(submit)
        assert caught.value.status == 503

    run(engines.pop, use)  # No second engine can be made.


def test_a_fault_of_a_look_ends_no_text():
    from mamba_eqx.serving._errors import ApiError

    def fail(engine: Engine) -> object:
        raise RuntimeError("a fault on purpose")

    async def use(worker: Any) -> None:
        engine = worker.engine
        following = worker.follow(submit)
        with pytest.raises(ApiError, match="has a fault") as caught:
            await worker.ask(fail)
        assert caught.value.status == 500
        assert await finish(following) == FinishReason.LENGTH
        assert worker.engine is engine

    run(make_engine, use)


def test_one_look_fits_between_two_steps():
    steps: list[int] = []

    class Counting(Engine):
        def step(self) -> Any:
            steps.append(len(steps))
            return super().step()

    async def use(worker: Any) -> None:
        following = worker.follow(submit)
        seen = await asyncio.gather(*(worker.ask(lambda engine: len(steps)) for _ in range(3)))
        assert await finish(following) == FinishReason.LENGTH
        # Eight tokens in blocks of four take three steps: the first token comes alone.
        assert len(set(seen)) == 3
        assert seen == sorted(seen)
        # An idle engine is looked at too.
        assert await worker.ask(lambda engine: engine.busy) is False

    run(lambda: Counting(MODEL, slots=1, max_len=64, block=4), use)


def test_looks_are_limited_and_end_with_the_engine(monkeypatch: pytest.MonkeyPatch):
    from mamba_eqx.serving import _worker
    from mamba_eqx.serving._errors import ApiError

    monkeypatch.setattr(_worker, "_MAX_QUESTIONS", 2)

    async def main() -> None:
        worker = _worker.Worker(make_engine)  # Its thread does not run yet.
        asked = [asyncio.ensure_future(worker.ask(lambda engine: 1)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="Too many") as caught:
            await worker.ask(lambda engine: 1)
        assert caught.value.status == 503
        with worker._lock:  # pyright: ignore[reportPrivateUsage]
            worker._stopping = True  # pyright: ignore[reportPrivateUsage]
        worker.start()
        for look in asked:
            with pytest.raises(ApiError, match="Restart the server"):
                await asyncio.wait_for(look, 60)
        with pytest.raises(ApiError, match="Restart the server"):
            await worker.ask(lambda engine: 1)

    asyncio.run(main())


@pytest.mark.parametrize("at", [0, 1])
def test_jobs_of_a_client_that_is_gone_are_cancelled(at: int):
    """The thread that submits them goes on after the handler of the request has ended."""
    from mamba_eqx.serving._worker import Worker

    engine = mbx.Engine(MODEL, slots=1, max_len=64)
    go, jobs = threading.Event(), []

    def submit(engine: mbx.Engine) -> Job:
        if len(jobs) == at:
            go.wait(60)
        jobs.append(engine.submit([1], 8))
        return jobs[-1]

    async def main() -> None:
        task = asyncio.create_task(Worker(lambda: engine).submit([submit] * 3))
        while len(jobs) < at:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        go.set()
        while len(jobs) <= at or not all(job.cancelled for job in jobs):
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), 60))
    assert len(jobs) == at + 1
