"""A queue from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio

from gptj.serving.continuation import Failed, Listener, Piece, Scored

__all__ = ["Channel", "Left"]

News = Piece | Scored | Failed
"""All that a listener may be told."""


class Left(Exception):
    """The client has left."""


class Channel:
    """The news of one request's choices, in their order.

    Attributes:
        waits: news are handed on when their choice has ended. A stream's are at once, and wake the event loop for each
            token; it takes the time of the model's own threads for that.
    """

    def __init__(self) -> None:
        self.waits = False
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[tuple[int, News | None]] = asyncio.Queue()
        self._held: list[tuple[int, News]] = []

    def listener(self, index: int) -> Listener:
        """The listener of a choice."""
        return lambda told: self._tell(index, told)

    def leave(self) -> None:
        """Say that the client has left."""
        self._told.put_nowait((-1, None))

    async def next(self) -> tuple[int, Piece | Scored]:
        """The next news, and the choice that it is of.

        Raises:
            Left: the client has left.
            Exception: what ended a choice.
        """
        index, told = await self._told.get()
        if told is None:
            raise Left
        if isinstance(told, Failed):
            raise told.error
        return index, told

    def _tell(self, index: int, told: News) -> None:
        self._held.append((index, told))
        if self.waits and (isinstance(told, Scored) or (isinstance(told, Piece) and told.finish is None)):
            return
        held, self._held = self._held, []
        try:
            self._loop.call_soon_threadsafe(self._put, held)
        except RuntimeError:  # the loop is closed: nobody listens any more
            return

    def _put(self, news: list[tuple[int, News]]) -> None:
        for one in news:
            self._told.put_nowait(one)
