"""How many requests are in flight, and how fast they follow each other."""

import asyncio
import time

import anyio


class Slots:
    """A limiter whose size follows the server: halved when it is busy, and slowly raised again to its maximum.

    Until [`open`] is called it is `first_size` at most.
    """

    def __init__(self, max_size: int, first_size: int):
        self._max_size, self._size = max_size, float(min(first_size, max_size))
        self._limiter = anyio.CapacityLimiter(int(self._size))
        self._halved_at = self._paused_until = 0.0

    async def __aenter__(self) -> None:
        """Waits for a slot, in the order of arrival, and for the end of a pause."""
        await self._limiter.acquire()
        try:
            while (seconds := self._paused_until - time.monotonic()) > 0:
                await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self._limiter.release()
            raise

    async def __aexit__(self, *error: object) -> None:
        self._limiter.release()

    def pause(self, seconds: float) -> None:
        """Lets no request begin for this long."""
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)

    def halve(self, sent_at: float) -> None:
        """Lowers the size, once for all the requests that were in flight together."""
        if sent_at > self._halved_at:
            self._halved_at = time.monotonic()
            self._resize(max(1.0, self._size / 2))

    def open(self) -> None:
        """Raises the size to its maximum, unless the server is busy."""
        if self._halved_at == 0:
            self._resize(self._max_size)

    def grow(self) -> None:
        self._resize(min(self._max_size, self._size + 1 / self._size))

    def _resize(self, size: float) -> None:
        self._size = size
        self._limiter.total_tokens = int(size)


class Pace:
    """Spaces requests evenly, this many seconds apart."""

    def __init__(self, interval_seconds: float):
        self.interval_seconds, self._next_at = interval_seconds, 0.0

    async def wait(self) -> None:
        """Waits for the turn of a request."""
        now = time.monotonic()
        turn = max(now, self._next_at)
        self._next_at = turn + self.interval_seconds
        if turn > now:
            await asyncio.sleep(turn - now)
