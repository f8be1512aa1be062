"""The faults that the doctor knows, and a report of those that it found."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Severity(StrEnum):
    ERROR = "error"  # something does not work, or is unsafe
    WARNING = "warning"  # it works worse than it could, or will stop working


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that can be wrong: why it matters, and what to change."""

    severity: Severity
    title: str
    why: str
    change: str


def _error(title: str, why: str, change: str) -> Fault:
    return Fault(Severity.ERROR, title, why, change)


def _warning(title: str, why: str, change: str) -> Fault:
    return Fault(Severity.WARNING, title, why, change)


# From outside

OUTSIDE = {
    "unreachable": _error(
        "The service does not answer",
        "Nobody can use it.",
        "Start it; look at its address, the firewall and the proxy's log.",
    ),
    "not-ready": _error(
        "The service is not able to serve",
        "Streams stay open but get nothing, and new ones are turned away.",
        "feed or database: see the service's log, and run the doctor on the database. draining: it "
        "is about to end; take it out of the proxy.",
    ),
    "not-the-service": _error(
        "Something else answers at this address",
        "A page of the proxy, or of another application, is taken for the service's answers.",
        "Pass /api/ on to the service, and leave its statuses and bodies as they are.",
    ),
    "operator-endpoints-public": _warning(
        "Everybody can read /metrics",
        "It tells strangers how many users are there and how busy they are.",
        "Answer /metrics, /livez and /readyz in the proxy with 404 (deploy/nginx.conf does).",
    ),
    "plain-http": _error(
        "Sessions travel unencrypted",
        "Whoever can listen in can take over a user's session; browsers offer no HTTP/2 either.",
        "Serve HTTPS: by a proxy (deploy/), or with SSE_TLS_CERT and SSE_TLS_KEY.",
    ),
    "certificate-invalid": _error(
        "The certificate is not trusted",
        "Browsers refuse the connection.",
        "Install a valid certificate with its whole chain. Name your own authority with --cafile.",
    ),
    "certificate-expires": _warning(
        "The certificate expires soon",
        "From then on browsers refuse every connection.",
        "Renew it, and reload the proxy; a service that does TLS itself reads it again on SIGHUP.",
    ),
    "no-http2": _warning(
        "No HTTP/2",
        "With HTTP/1.1 a browser opens six connections to a host; each stream that a page does not "
        "share keeps one of them busy, and with six the page stands still.",
        'Switch HTTP/2 on in the proxy (nginx: "listen 443 ssl http2"). The service itself speaks '
        "HTTP/1.1; it does not matter between the two.",
    ),
    "proxy-hides-host": _error(
        "Calls of the service's own pages are refused as cross-site",
        "The service compares the page's Origin with Host and the scheme, and the proxy has "
        "changed or left out one of them.",
        "In the proxy pass Host on with its port and set X-Forwarded-Proto; in the service set "
        "SSE_TRUSTED_PROXIES to the address that the proxy connects from.",
    ),
    "cookie-not-httponly": _error(
        "The session's cookie is not HttpOnly",
        "A script that got into the page can take the session away with it.",
        "The service sets HttpOnly: leave Set-Cookie alone in the proxy.",
    ),
    "cookie-not-secure": _error(
        "The session's cookie is not Secure",
        "The browser sends it over plain HTTP as well, where others can read it.",
        "Set X-Forwarded-Proto in the proxy and SSE_TRUSTED_PROXIES in the service: it then knows "
        "that the browser came by HTTPS.",
    ),
    "cookie-samesite": _error(
        "The session's cookie has no SameSite of use",
        "Other sites can make the browser call the service with the user's session.",
        "The service sets SameSite=Lax, or None with Partitioned if it has SSE_ALLOWED_ORIGINS: "
        "leave Set-Cookie alone in the proxy.",
    ),
    "stream-refused": _error(
        "The stream is not served",
        "No notification reaches a page.",
        "See what the answer says, and the service's log.",
    ),
    "stream-buffered": _error(
        "The stream is held back on its way",
        "Notifications come late, in batches or never; the bundled client falls back to polling.",
        "In the proxy switch buffering off for /api/stream (nginx: proxy_buffering off, "
        "proxy_http_version 1.1, and no proxy_ignore_headers X-Accel-Buffering).",
    ),
    "stream-compressed": _error(
        "The stream is compressed",
        "A compressor holds events back until it has enough of them, and the size of what it sends "
        "betrays what is in it.",
        "Leave text/event-stream out of compression (nginx: gzip off, or no text/event-stream and "
        "no * in gzip_types).",
    ),
    "stream-cacheable": _error(
        "The stream may be cached",
        "A cache could give one user's notifications to another, or old ones again.",
        "The service sends Cache-Control: no-cache or no-store: leave it alone, and switch caching "
        "off for /api/.",
    ),
    "stream-cut": _error(
        "The stream is cut off in silence",
        "Every stream breaks whenever nothing was sent for that long: clients reconnect and replay "
        "without end, and what was sent meanwhile comes late.",
        "Let the proxy wait longer than the heartbeat for the next byte (nginx: "
        "proxy_read_timeout), or lower SSE_HEARTBEAT_SECONDS.",
    ),
    "heartbeat-late": _error(
        "Heartbeats do not arrive in time",
        "Clients take the line for dead after two and a half heartbeats and reconnect, again and "
        "again.",
        "Look for a proxy that holds back, or a service that has too much to do.",
    ),
    "clock-skew": _warning(
        "The clocks differ",
        "Sign-in tokens are refused when the backend's clock is half a minute ahead of the "
        "service's or their short life seems to be over; latencies in /metrics are wrong.",
        "Let all machines keep time by NTP. (It may be the clock of this machine.)",
    ),
}

# From the database

INSIDE = {
    "database-unreachable": _error(
        "The database cannot be reached",
        "Nothing works without it.",
        "Look at DATABASE_URL, the network, pg_hba.conf and PostgreSQL's log.",
    ),
    "database-read-only": _error(
        "The database is a standby",
        "Sessions cannot start, streams cannot open, nothing can be marked as read, and NOTIFY "
        "does not come from a standby.",
        "Point DATABASE_URL to the primary; with several hosts, add "
        "target_session_attrs=read-write.",
    ),
    "transaction-pooler": _error(
        "Between here and PostgreSQL is a pooler in transaction mode",
        "LISTEN belongs to a connection that the pooler gives to others after each transaction: "
        "feeds hear nothing, and every notification waits for the next sweep of the table.",
        "Set SSE_LISTEN_DATABASE_URL to what leads to PostgreSQL itself, or to a pool in session "
        "mode; DATABASE_URL and your backends may go on using the pooler.",
    ),
    "notify-lost": _error(
        "NOTIFY does not arrive",
        "Every notification waits for the next sweep of the table.",
        "Look for a pooler in between, and at the usage of the queue of NOTIFY.",
    ),
    "schema-missing": _error(
        "There is no schema",
        "There is nothing to serve.",
        "sse-server schema --apply, or start a server; look at the search_path in DATABASE_URL.",
    ),
    "schema-differs": _warning(
        "The schema is that of another version",
        "Its functions and triggers may do less, or other things, than this version relies on.",
        "sse-server schema --apply, or restart a server of this version. If servers of another "
        "version are running, run their doctor.",
    ),
    "trigger-missing": _error(
        "A trigger is missing",
        "notifications_accept: neither preferences nor rate limits hold. The others: what changes "
        "reaches open streams late or not at all, or is not audited.",
        "psql -f schema.sql makes it again (sse-server schema | psql); a server that finds its own "
        "version applied does not look.",
    ),
    "trigger-disabled": _error(
        "A trigger is disabled",
        "The same as if it were missing; usually left over from a bulk load.",
        "ALTER TABLE … ENABLE TRIGGER …",
    ),
    "settings-missing": _error(
        "The table settings has no row",
        "Feeds have no channel, and limits do not hold.",
        "INSERT INTO settings DEFAULT VALUES; then restart the servers: the channel is a new one.",
    ),
    "notify-queue": _warning(
        "The queue of NOTIFY fills up",
        "When it is full, every transaction that notifies fails, in all databases of the cluster. "
        "Nothing leaves it before the slowest listener has read it.",
        "End the transaction that a listening session has left open (pg_stat_activity; it need not "
        "be one of the service's).",
    ),
    "long-transaction": _warning(
        "A transaction is open for long",
        "While it runs, the horizon stands still: replays repeat every row written since it began, "
        "and vacuum can remove nothing that was deleted since then.",
        "Find out what it waits for; end it with pg_terminate_backend(pid). Set "
        "idle_in_transaction_session_timeout for the role.",
    ),
    "prepared-transaction": _warning(
        "A prepared transaction is waiting to be finished",
        "As a transaction that is open for long; it also survives a restart.",
        "COMMIT PREPARED or ROLLBACK PREPARED its name.",
    ),
    "replication-slot": _warning(
        "A replication slot is not used by anybody",
        "It keeps all WAL since then until the disk is full, and may hold vacuum back.",
        "Bring its consumer back, or SELECT pg_drop_replication_slot(name).",
    ),
    "autovacuum-off": _error(
        "Autovacuum is off",
        "Rows that retention deletes and versions left by marking as read are never removed: "
        "tables and indexes grow, and one day the cluster stops for want of transaction ids.",
        "ALTER SYSTEM RESET autovacuum (and track_counts); "
        "ALTER TABLE … RESET (autovacuum_enabled).",
    ),
    "dead-rows": _warning(
        "Autovacuum does not keep up",
        "Every query reads past dead rows.",
        "Look for what holds it back (long transactions, slots); then VACUUM the table, and give "
        "autovacuum more (autovacuum_vacuum_cost_limit, autovacuum_max_workers).",
    ),
    "wraparound": _error(
        "Transaction ids are running out",
        "At two thousand million PostgreSQL takes no more writes.",
        "Look for what holds vacuum back, then VACUUM (FREEZE) the oldest tables.",
    ),
    "role-with-rights": _warning(
        "A role may do more than publishers need",
        "Whoever can read settings learns the feeds' channel, and with it everybody's "
        "notifications; whoever can write whole rows can choose source, time and transaction.",
        "REVOKE them, and grant what the head of schema.sql lists for publishers.",
    ),
    "connections": _warning(
        "Connections are short",
        "A server that gets none cannot open streams, and turns calls away with 503.",
        "Lower SSE_POOL_SIZE, raise max_connections, or put your backends behind a pooler.",
    ),
    "retention-behind": _warning(
        "Old notifications are still there",
        "The table grows. Retention runs inside the servers, one at a time.",
        "Look in the servers' logs for retention; lower retention_days later, in steps.",
    ),
    "database-clock-skew": _warning(
        "The database's clock differs",
        "Sessions and rate limits go by the database's clock, tokens and latencies by the "
        "service's.",
        "Let all machines keep time by NTP. (It may be the clock of this machine.)",
    ),
}

FAULTS = {**OUTSIDE, **INSIDE}


@dataclass(frozen=True, slots=True)
class Finding:
    """A fault that is there, and what was seen of it."""

    fault: str
    what: str

    @property
    def severity(self) -> Severity:
        return FAULTS[self.fault].severity

    def as_json(self) -> dict[str, str]:
        fault = FAULTS[self.fault]
        return {
            "fault": self.fault,
            "severity": fault.severity.value,
            "title": fault.title,
            "what": self.what,
            "why": fault.why,
            "change": fault.change,
        }


@dataclass(slots=True)
class Report:
    """What was found wrong, what was found right, and what could not be looked at."""

    findings: list[Finding] = field(default_factory=list)
    passed: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def find(self, fault: str, what: str) -> None:
        """Add a finding; `what` is one sentence."""
        assert fault in FAULTS
        self.findings.append(Finding(fault, what))

    def ok(self, check: str, detail: str = "") -> None:
        self.passed.append((check, detail))

    def skip(self, check: str, reason: str) -> None:
        self.skipped.append((check, reason))

    def found(self, *faults: str) -> bool:
        return any(finding.fault in faults for finding in self.findings)

    def as_json(self) -> dict[str, object]:
        return {
            "findings": [finding.as_json() for finding in self.findings],
            "passed": [{"check": check, "detail": detail} for check, detail in self.passed],
            "skipped": [{"check": check, "reason": reason} for check, reason in self.skipped],
        }


_HEAD = """# The doctor

<!-- Written by `python -m sse_server.doctor.faults`; a test compares. -->

`sse-server doctor URL` looks at a service that is deployed as a browser would see it, through
every proxy. With `DATABASE_URL` set (or a PostgreSQL of its own running) it looks at the database
as well; without a URL, at that alone. It changes nothing: it opens a session of its own and one
stream, and ends both.

<!-- not run: needs a deployed service; tests/test_doctor.py runs it -->
```sh
sse-server doctor https://push.example.com                            # with SSE_JWT_SECRET
sse-server doctor https://push.example.com --token-file token.txt     # of your backend's
sse-server doctor https://push.example.com --cookie-file cookies.txt  # a session there already
sse-server doctor http://127.0.0.1:8080                               # by the demo's sign-in
sse-server doctor                                                     # the database alone
```

Exit status 0: nothing found; 1: something was; 2: it could not begin. `--json` is for scripts:
`findings` (`fault`, `severity`, `title`, `what`, `why`, `change`), `passed` and `skipped`. What
could not be looked at is said with the reason, and does not count as healthy.

The stream is held for `--wait` seconds, by default a little more than two heartbeats: an idle
timeout is found if it is shorter than the heartbeat, and then measured. A cookie from a browser
is that browser's session: its own stream is superseded while the doctor looks.

Run it from where the users are: what is behind a proxy does not see it.
"""


def markdown() -> str:
    """The page of the documentation."""
    lines = [_HEAD.rstrip()]
    for title, faults in (("From outside", OUTSIDE), ("From the database", INSIDE)):
        lines += [
            "",
            f"## {title}",
            "",
            "| fault | why it matters | what to change |",
            "|---|---|---|",
        ]
        for name, fault in faults.items():
            lines.append(
                f"| **{fault.title}**<br>`{name}`, {fault.severity.value} | {fault.why} "
                f"| {fault.change} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import sys

    sys.stdout.write(markdown())
