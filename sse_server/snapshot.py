"""PostgreSQL's snapshots: which transactions had ended when somebody looked.

A cursor over commits. Ids are handed out at INSERT and become visible at COMMIT, in another order;
"everything after id n" therefore loses rows. "Everything that the last snapshot did not show"
does not.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Of each 2**32 transaction ids PostgreSQL leaves the first three out (transam.h).
_EPOCH = 2**32
_FIRST_XID = 3


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A ``pg_snapshot`` (PostgreSQL manual, 9.27.9).

    Attributes:
        text: As PostgreSQL writes it: ``xmin:xmax:xip,xip,…``.
        xmin: Every transaction below this had ended.
        xmax: No transaction from this on had ended.
        xip: Those between that were still running.
    """

    text: str
    xmin: int = field(init=False)
    xmax: int = field(init=False)
    xip: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        xmin, xmax, xip = self.text.split(":")
        object.__setattr__(self, "xmin", int(xmin))
        object.__setattr__(self, "xmax", int(xmax))
        object.__setattr__(self, "xip", frozenset(map(int, xip.split(","))) if xip else frozenset())

    def lasting(self, newest: int) -> Snapshot:
        """The same, as far as it outlives a crash of the database.

        Transaction ids are handed out in memory. Those of which nothing had reached the disk (they
        were rolled back, say) are handed out again after a crash, to transactions that this
        snapshot does not show, whatever it says. Up to the newest row that it shows, all is on the
        disk.

        Args:
            newest: The greatest xact of the rows that it shows; 0 if there are none.
        """
        xmax = newest + 1
        if xmax % _EPOCH == 0:
            xmax += _FIRST_XID  # PostgreSQL gives no such id, nor takes one
        if xmax >= self.xmax:
            return self
        running = ",".join(str(xact) for xact in sorted(self.xip) if xact < xmax)
        return Snapshot(f"{min(self.xmin, xmax)}:{xmax}:{running}")

    def covers(self, xact: int) -> bool:
        """Whether rows of this transaction are in what the snapshot shows."""
        return xact < self.xmin or (xact < self.xmax and xact not in self.xip)


# Shows nothing. (0 is not a transaction id, and no row bears 1 or 2.)
NOTHING = Snapshot("1:1:")
