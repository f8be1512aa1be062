"""Who may ask how often: aiolimiter's leaky buckets, one for each key, forgotten when idle.

A bucket of n per minute takes n at once and then one every 60/n seconds. What other processes tell
of (`usage`) goes into the same buckets, so a limit is one for all of them together, though each may
be a moment behind. What must be exact across nodes and writers is enforced in the database
(``settings.user_rate_per_minute``).

Nothing else imports aiolimiter.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler
from aiohttp_session import get_session
from aiolimiter import AsyncLimiter

from sse_server.errors import TooManyRequests

if TYPE_CHECKING:
    # Not imported: it imports prometheus_client, for which a master prepares a directory first.
    from sse_server.metrics import Metrics

# Seconds in which a full bucket runs empty: limits are per minute.
PERIOD = 60.0

# Part of a limit that, used here and not yet told to the other processes, is urgent to tell.
URGENT_SHARE = 0.1

# Keys whose refusals are reported one by one in one period; the others only as a number.
MOST_REPORTED = 1000

# Called with the name of the limit, the key, and how many refusals (more) there were.
Refused = Callable[[str, str, int], None]

# Called for each refusal.
Counted = Callable[[], None]


class Limit:
    """One limit for many keys.

    A bucket that was not used for a period is empty, and as good as none: so it is dropped, and
    what is kept is bounded by the keys that were used within the last two periods.
    """

    def __init__(
        self,
        name: str,
        rate: float,
        *,
        period: float = PERIOD,
        refused: Refused | None = None,
        refusals: Counted | None = None,
        urgent: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            name: For the audit.
            rate: How many per period; 0 is no limit.
            period: Seconds.
            refused: Told of the first refusal of a key in a period at once, and of the others
                together at its end. A flood must not become a flood of records.
            refusals: Counts each.
            urgent: Called when `untold()` had better be called soon.
        """
        self.name = name
        self.rate = rate
        self.period = period
        self._refused = refused
        self._counted = refusals
        self._urgent = urgent
        # What was taken since `untold()` was called last: how many, and by which rate.
        self._untold: dict[str, tuple[int, float]] = {}
        # Used in this period, and in the one before; see rotate().
        self._buckets: dict[str, AsyncLimiter] = {}
        self._older: dict[str, AsyncLimiter] = {}
        self._refusals: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._buckets) + len(self._older)

    async def take(self, key: str, *, rate: float | None = None) -> bool:
        """Count one for the key, if there is room. Never waits.

        Args:
            key: Whose bucket.
            rate: Instead of the limit's own; if it has changed, the bucket starts anew.

        Returns: False if it is over the limit; this is then not counted.
        """
        rate = self.rate if rate is None else rate
        if not rate:
            return True
        bucket = self._bucket(key, rate)
        if not bucket.has_capacity():
            self._report(key)
            return False
        # acquire() looks again, and would wait if somebody had been quicker. Nobody can have been:
        # a coroutine that is awaited runs at once, and this one has nothing to wait for.
        await bucket.acquire()
        count = self._untold.get(key, (0, rate))[0] + 1
        self._untold[key] = count, rate
        if self._urgent is not None and count >= URGENT_SHARE * rate:
            self._urgent()
        return True

    def untold(self) -> list[tuple[str, int, float]]:
        """What was taken since it was called last: (key, how many, rate) each."""
        untold, self._untold = self._untold, {}
        return [(key, count, rate) for key, (count, rate) in untold.items()]

    async def heard(self, key: str, count: int, rate: float) -> None:
        """Count what another process has taken: as much of it as there is room for.

        Args:
            key: Whose bucket.
            count: How many.
            rate: By which that process judges the key, for one that is unknown here.
        """
        if not self.rate or rate <= 0:
            return
        bucket = self._bucket(key, rate, keep=True)
        amount = count
        while amount >= 1:
            if bucket.has_capacity(amount):
                await bucket.acquire(amount)  # as in take(): this does not wait
                count -= amount
                amount = min(amount, count)
            else:
                amount //= 2

    async def require(self, key: str, *, rate: float | None = None) -> None:
        """`take()`, or refuse the request.

        Raises:
            TooManyRequests: It is over the limit.
        """
        if not await self.take(key, rate=rate):
            raise self.refusal(rate)

    def has_room(self, key: str) -> bool:
        """Whether `take()` would succeed."""
        return not self.rate or self._bucket(key, self.rate).has_capacity()

    def refusal(self, rate: float | None = None) -> TooManyRequests:
        """What to answer to somebody who is over the limit."""
        # By then there is room for one: a bucket is never more than full.
        wait = self.period / (self.rate if rate is None else rate)
        return TooManyRequests(
            f"Over the limit for {self.name}. Wait, then try again.", retry_after=wait
        )

    def rotate(self) -> None:
        """Forget the keys that were not used for a whole period. To be called once in each."""
        self._older, self._buckets = self._buckets, {}
        self._untold.clear()
        refusals, self._refusals = self._refusals, {}
        if self._refused is None:
            return
        others = sum(list(refusals.values())[MOST_REPORTED:])
        for key, count in list(refusals.items())[:MOST_REPORTED]:
            if count > 1:
                self._refused(self.name, key, count - 1)
        if others:
            self._refused(self.name, "others", others)

    def _bucket(self, key: str, rate: float, *, keep: bool = False) -> AsyncLimiter:
        """The key's bucket; a new one if its rate is another, unless it is to be kept."""
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._older.pop(key, None)
        if bucket is None or (bucket.max_rate != rate and not keep):
            bucket = AsyncLimiter(rate, self.period)
        self._buckets[key] = bucket
        return bucket

    def _report(self, key: str) -> None:
        if self._counted is not None:
            self._counted()
        count = self._refusals[key] = self._refusals.get(key, 0) + 1
        if count == 1 and len(self._refusals) <= MOST_REPORTED and self._refused is not None:
            self._refused(self.name, key, 1)


def network(remote: str | None) -> str:
    """Under which key an address is counted: itself, or its /64 for IPv6.

    Whoever has one IPv6 address has all of its /64 (RFC 6177).
    """
    try:
        address = ipaddress.ip_address(remote or "")
    except ValueError:
        return "unknown"  # a Unix socket
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((address.packed, 64), strict=False))


class Limits:
    """All limits of one process."""

    def __init__(
        self,
        *,
        # Per minute; 0 is no limit
        api_calls: float = 120,
        anonymous_calls: float = 600,
        sign_ins: float = 60,
        refused: Refused | None = None,
        period: float = PERIOD,
        metrics: Metrics | None = None,
    ) -> None:
        """
        Args:
            api_calls: Of one user; opening a stream is one.
            anonymous_calls: Of one address without a valid session.
            sign_ins: Of one address: attempts to sign in, and wrong service keys.
            refused: As for `Limit`; the key is that of `Audit`: ``user:ID``, ``address:IP``,
                ``service:NAME``.
            period: Seconds, in place of a minute.
            metrics: Where refusals are counted.
        """
        self._period = period

        def limit(name: str, rate: float, label: str) -> Limit:
            counted = None if metrics is None else metrics.refusals.labels(label).inc
            return Limit(
                name,
                rate,
                period=period,
                refused=refused,
                refusals=counted,
                urgent=self.urgent.set,
            )

        # Set when a good part of some limit was used since the other processes were told of it.
        self.urgent = asyncio.Event()
        self.users = limit("API calls", api_calls, "api_calls")
        self.anonymous = limit("calls without a session", anonymous_calls, "anonymous_calls")
        self.sign_ins = limit("sign-in attempts", sign_ins, "sign_ins")
        self.services = limit("publishing", 600, "publishing")
        # By the names under which processes tell one another of them.
        self.by_name: Mapping[str, Limit] = {
            "users": self.users,
            "anonymous": self.anonymous,
            "sign_ins": self.sign_ins,
            "services": self.services,
        }
        # Whose session a key (its hash) is, of those used lately; see may_open_stream().
        self._sessions: dict[bytes, str] = {}
        self._older_sessions: dict[bytes, str] = {}

    def seen(self, key: str, user_id: str) -> bool:
        """Remember whose session this key is. Returns: Whether that was known."""
        digest = hashlib.sha256(key.encode()).digest()
        known = digest in self._sessions or digest in self._older_sessions
        self._sessions[digest] = user_id
        return known

    async def may_open_stream(self, key: str) -> bool:
        """Count the opening of a stream, if it is known whose session this key is.

        The claim to a stream would tell, but it ends the session's older stream. So a session that
        has used the API lately is refused before it can do that.
        """
        digest = hashlib.sha256(key.encode()).digest()
        user_id = self._sessions.get(digest) or self._older_sessions.get(digest)
        return user_id is None or await self.users.take(f"user:{user_id}")

    async def claimed_stream(self, key: str, user_id: str) -> bool:
        """Count the opening of a stream now that its user is known, unless it is counted."""
        return self.seen(key, user_id) or await self.users.take(f"user:{user_id}")

    def rotate(self) -> None:
        """Drop what is idle."""
        for limit in self.by_name.values():
            limit.rotate()
        self._older_sessions, self._sessions = self._sessions, {}

    async def run(self) -> None:
        """Drop what is idle, for ever."""
        while True:
            await asyncio.sleep(self._period)
            self.rotate()


LIMITS = web.AppKey("limits", Limits)

# Count themselves: a stream knows its user only later, and publishers are services.
_OWN = frozenset({"/api/stream", "/api/publish"})


@web.middleware
async def limited(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Count every call under ``/api/``: for its user, or for its address if it has none.

    Needs aiohttp-session's middleware around it.

    Raises:
        TooManyRequests: Over the limit.
    """
    path = request.path
    if not path.startswith("/api/") or path in _OWN or request.method == hdrs.METH_OPTIONS:
        return await handler(request)
    limits = request.app[LIMITS]
    if path == "/api/session" and request.method == hdrs.METH_POST:
        await limits.sign_ins.require(f"address:{network(request.remote)}")
        return await handler(request)
    session = await get_session(request)
    user_id = session.get("user_id")
    if user_id is not None:
        limits.seen(str(session.identity), user_id)
        await limits.users.require(f"user:{user_id}")
    else:
        await limits.anonymous.require(f"address:{network(request.remote)}")
    return await handler(request)
