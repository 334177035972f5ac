"""How many requests are in flight, and how fast they follow each other."""

import asyncio
import time
from collections import deque


class Slots:
    """A semaphore whose size follows the server: halved when it is busy, and slowly raised again to its maximum."""

    def __init__(self, max_size: int):
        self.max_size, self.size, self.num_taken = max_size, float(max_size), 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._halved_at = 0.0
        self._pause: asyncio.TimerHandle | None = None

    async def acquire(self) -> None:
        """Waits for a slot, in the order of arrival."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._grant()
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.release()
            raise

    def release(self) -> None:
        self.num_taken -= 1
        self._grant()

    def pause(self, seconds: float) -> None:
        """Grants no slot for this long."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        if self._pause is None or self._pause.when() < end:
            if self._pause is not None:
                self._pause.cancel()
            self._pause = loop.call_at(end, self._resume)

    def _resume(self) -> None:
        self._pause = None
        self._grant()

    def _grant(self) -> None:
        while self._waiting and self.num_taken < int(self.size) and self._pause is None:
            future = self._waiting.popleft()
            if not future.done():
                self.num_taken += 1
                future.set_result(None)

    def halve(self, sent_at: float) -> None:
        """Lowers the size, once for all the requests that were in flight together."""
        if sent_at > self._halved_at:
            self._halved_at = time.monotonic()
            self.size = max(1.0, self.size / 2)

    def grow(self) -> None:
        self.size = min(self.max_size, self.size + 1 / self.size)


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
