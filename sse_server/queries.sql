-- Every query of the service, under the name by which sse_server/store.py knows it.
-- Transaction ids travel as bigint or text: the driver has no type for xid8.

-- Of the schema that schema.sql would fill, not of one that stands behind it in the search path.
-- name: schema_version
SELECT obj_description(to_regclass(quote_ident(current_schema()) || '.settings'), 'pg_class')

-- Sessions ----------------------------------------------------------------------------------------

-- name: session_by_key
SELECT id, user_id, data, floor(extract(epoch FROM created_at) * 1000)::bigint,
       floor(extract(epoch FROM expires_at) * 1000)::bigint
  FROM sessions
 WHERE key_hash = %(key_hash)s AND expires_at > clock_timestamp()

-- No row comes back if the token has been used before. A used token is remembered for an hour
-- longer than it lives, and none is taken that could already be forgotten: both by this clock, so
-- that no node's clock can be wrong enough to let one in twice.
-- name: insert_session
WITH token AS (
    SELECT %(token_hash)s::bytea AS hash,
           to_timestamp(%(token_expires)s::float8) + interval '1 hour' AS expires_at
), used AS (
    INSERT INTO used_tokens (token_hash, expires_at)
    SELECT hash, expires_at FROM token WHERE hash IS NOT NULL AND expires_at > clock_timestamp()
    ON CONFLICT (token_hash) DO NOTHING
    RETURNING 1
), allowed AS (
    SELECT FROM token WHERE hash IS NULL OR EXISTS (SELECT FROM used)
), ended AS (
    DELETE FROM sessions WHERE key_hash = %(old_key_hash)s::bytea AND EXISTS (SELECT FROM allowed)
)
INSERT INTO sessions (key_hash, user_id, data, expires_at)
SELECT %(key_hash)s, %(user_id)s, %(data)s,
       clock_timestamp() + make_interval(secs => %(seconds)s)
  FROM allowed
ON CONFLICT (key_hash) DO NOTHING
RETURNING id, user_id, data, floor(extract(epoch FROM created_at) * 1000)::bigint,
          floor(extract(epoch FROM expires_at) * 1000)::bigint

-- name: update_session
UPDATE sessions SET user_id = %(user_id)s, data = %(data)s WHERE key_hash = %(key_hash)s

-- name: delete_session
DELETE FROM sessions WHERE key_hash = %(key_hash)s

-- Locked in the order of their ids: two nodes may open streams of the same sessions at once.
-- A session that is asked for several times in one batch gets as many numbers. None at all if its
-- user has as many streams as one may, in other sessions and on whatever nodes: exact but for those
-- that several nodes open at the same moment.
-- name: claim_streams
WITH wanted AS (
    SELECT *
      FROM unnest(%(key_hashes)s::bytea[], %(counts)s::int[])
           WITH ORDINALITY AS w (key_hash, count, position)
), locked AS MATERIALIZED (
    SELECT s.id, s.key_hash, s.user_id, w.count, w.position,
           s.stream_at > clock_timestamp() - make_interval(secs => %(seconds)s) AS open
      FROM sessions s JOIN wanted w ON w.key_hash = s.key_hash
     WHERE s.expires_at > clock_timestamp()
     ORDER BY s.id
       FOR NO KEY UPDATE OF s
), others AS (
    SELECT u.user_id,
           -- Nobody's thousands of sessions may make each claim slow.
           (SELECT count(*)
              FROM (SELECT FROM (SELECT s.stream_at, s.expires_at FROM sessions s
                                  WHERE s.user_id = u.user_id LIMIT 10000) AS s
                     WHERE s.stream_at > clock_timestamp() - make_interval(secs => %(seconds)s)
                       AND s.expires_at > clock_timestamp()
                     LIMIT %(most)s + u.asking) AS open)
           - u.open AS streams
      FROM (SELECT user_id, count(*) AS asking, count(*) FILTER (WHERE open) AS open
              FROM locked GROUP BY user_id) AS u
), allowed AS MATERIALIZED (
    SELECT l.id, l.count
      -- First those whose session has a stream already: it is the same one, opened anew.
      FROM (SELECT *, row_number() OVER (PARTITION BY user_id
                                             ORDER BY open IS NOT TRUE, position) AS nth
              FROM locked) AS l
      JOIN others o ON o.user_id = l.user_id
     WHERE o.streams + l.nth <= %(most)s
), claimed AS (
    UPDATE sessions s SET stream = s.stream + a.count, stream_at = clock_timestamp()
      FROM allowed a WHERE s.id = a.id
    RETURNING s.id, s.stream,
              extract(epoch FROM s.expires_at - clock_timestamp())::float8 AS seconds_left
)
SELECT l.key_hash, l.id, l.user_id, c.stream, c.seconds_left,
       (SELECT pg_notify((SELECT channel FROM settings),
                         '{"t":"stream","s":[' || string_agg('[' || id || ',' || stream || ']', ',')
                         || ']}')
          FROM claimed HAVING count(*) > 0)
  FROM locked l LEFT JOIN claimed c ON c.id = l.id

-- Streams that have ended, unless their session has opened another one. Locked in the same order.
-- name: release_streams
WITH ended AS MATERIALIZED (
    SELECT s.id
      FROM sessions s
      JOIN unnest(%(ids)s::bigint[], %(numbers)s::bigint[]) AS e (id, number)
        ON s.id = e.id AND s.stream = e.number
     ORDER BY s.id
       FOR NO KEY UPDATE OF s
)
UPDATE sessions s SET stream_at = NULL FROM ended e WHERE s.id = e.id

-- What the users of this process have used, for the limits of the others.
-- name: share_usage
SELECT pg_notify((SELECT channel FROM settings), payload)
  FROM unnest(%(payloads)s::text[]) AS payload

-- Which of these streams should still be open: seconds until the session expires (by the database's
-- clock, the nodes' may differ) and its newest stream.
-- name: check_sessions
SELECT id, extract(epoch FROM expires_at - clock_timestamp())::float8, stream
  FROM sessions
 WHERE id = ANY(%(ids)s::bigint[]) AND expires_at > clock_timestamp()

-- Rows that another process is deleting are left to it; waiting could deadlock. An array and not
-- `IN`, for which the planner prefers to read the whole table.
-- name: delete_expired_sessions
WITH tokens AS (
    DELETE FROM used_tokens WHERE token_hash = ANY (ARRAY(
        SELECT token_hash FROM used_tokens
         WHERE expires_at <= statement_timestamp() ORDER BY expires_at LIMIT 1000
           FOR UPDATE SKIP LOCKED))
    RETURNING 1
), expired AS (
    DELETE FROM sessions WHERE id = ANY (ARRAY(
        SELECT id FROM sessions
         WHERE expires_at <= statement_timestamp() ORDER BY expires_at LIMIT 1000
           FOR UPDATE SKIP LOCKED))
    RETURNING 1
)
SELECT greatest((SELECT count(*) FROM tokens), (SELECT count(*) FROM expired))

-- Replay ------------------------------------------------------------------------------------------

-- One page for each of several streams: the unread rows that `snapshot` shows and `base` does not.
-- All pages of a pass see one snapshot. Otherwise a row that commits between two pages, with an id
-- of the first, would be skipped, and the client's cursor, by then in the second, would cover it.
-- On a stream's first page the base comes from the row that the client has last received; `known`
-- is false if there is no such row of this user, and the page starts from the oldest unread row.
-- name: replay
-- Materialised: else the count, and the parsing of the snapshots, are repeated for every row.
WITH q AS MATERIALIZED (
    SELECT w.n, w.user_id, w.after_id, w.cursor,
           w.cursor IS NULL OR a.id IS NOT NULL AS known,
           coalesce(w.base::pg_snapshot, (a.horizon || ':' || a.horizon || ':')::pg_snapshot,
                    '1:1:') AS base,
           -- One from the future is another cluster's: not used, and that shows in the answer.
           CASE WHEN pg_snapshot_xmax(w.snapshot::pg_snapshot)
                     <= pg_snapshot_xmax(pg_current_snapshot())
                THEN w.snapshot::pg_snapshot
                ELSE pg_current_snapshot()
           END AS snapshot,
           CASE WHEN w.counted THEN (
               SELECT count(*)
                 FROM notifications WHERE user_id = w.user_id AND read_at IS NULL)
           END AS unread_count,
           -- `ORDER BY xact` would be by the answer, which has that name too: a sort of all rows.
           coalesce((SELECT m.xact::text::bigint
                       FROM notifications m ORDER BY m.xact DESC LIMIT 1), 0) AS newest
      FROM unnest(%(n)s::int[], %(user_ids)s::text[], %(cursors)s::bigint[],
                  %(bases)s::text[], %(snapshots)s::text[], %(after_ids)s::bigint[],
                  %(counted)s::boolean[])
           AS w (n, user_id, cursor, base, snapshot, after_id, counted)
      LEFT JOIN notifications a ON a.id = w.cursor AND a.user_id = w.user_id
)
SELECT q.n, q.known, q.snapshot::text, q.unread_count,
       r.id, r.event_type, r.message, r.link,
       floor(extract(epoch FROM r.created_at) * 1000)::bigint, r.xact::text::bigint, q.newest
  FROM q
  LEFT JOIN LATERAL (
       SELECT id, event_type, message, link, created_at, xact
         FROM notifications
        WHERE user_id = q.user_id AND read_at IS NULL
          AND id > q.after_id AND id IS DISTINCT FROM q.cursor
          AND xact >= pg_snapshot_xmin(q.base)
          AND NOT pg_visible_in_snapshot(xact, q.base)
          AND pg_visible_in_snapshot(xact, q.snapshot)
        ORDER BY id
        LIMIT %(limit)s) AS r ON true
 ORDER BY q.n, r.id

-- name: unread_counts
SELECT u.user_id, count(n.id)
  FROM unnest(%(user_ids)s::text[]) AS u (user_id)
  LEFT JOIN notifications n ON n.user_id = u.user_id AND n.read_at IS NULL
 GROUP BY u.user_id

-- Feed --------------------------------------------------------------------------------------------

-- name: feed_start
SELECT s.channel, reset_foreign_xacts() IS NULL, pg_current_snapshot()::text,
       n.id, n.xact::text::bigint,
       EXISTS (SELECT FROM notifications
                WHERE id = %(id)s AND xact = %(xact)s::bigint::text::xid8)
  FROM settings s
  LEFT JOIN (SELECT id, xact FROM notifications ORDER BY xact DESC, id DESC LIMIT 1) AS n ON true

-- Whether NOTIFY arrives is tried before anything depends on it.
-- name: channel
SELECT channel FROM settings

-- name: notify
SELECT channel, pg_notify(%(channel)s, '') IS NULL FROM settings

-- Also how many of this database's transactions wait to notify. They wait for a lock on database 0,
-- which stands for all of them.
-- name: feed_mode
SELECT feed_mode, polling_until > clock_timestamp(),
       (SELECT count(*)
          FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
         WHERE NOT l.granted AND l.locktype = 'object' AND l.classid = 'pg_database'::regclass
           AND l.objid = 0 AND a.datname = current_database())
  FROM settings

-- One commit both stops the triggers and tells all feeds to poll: whoever does not notify has seen
-- it, and by then the feeds have heard. Prolonging needs no words.
-- name: feed_poll
WITH old AS (
    SELECT polling_until > clock_timestamp() AS polls FROM settings
), lease AS (
    UPDATE settings SET polling_until = clock_timestamp() + make_interval(secs => %(seconds)s)
     WHERE polling_until < clock_timestamp() + make_interval(secs => %(seconds)s / 2)
    RETURNING channel
)
SELECT pg_notify(lease.channel, '{"t":"mode","polls":true}') FROM lease, old WHERE NOT old.polls

-- name: feed_notify
WITH lease AS (
    UPDATE settings SET polling_until = '-infinity'
     WHERE polling_until > clock_timestamp()
    RETURNING channel
)
SELECT pg_notify(lease.channel, '{"t":"mode","polls":false}') FROM lease

-- Who got rows that `snapshot` shows and `base` does not: those of transactions that were running
-- then, and of later ones. In the order of transactions, so that no row comes before one that it
-- covers (a row's horizon is never above its own transaction). One snapshot for all pages.
-- Where a page starts is one comparison and not two: of `xact >= … AND (xact, id) > …` an index scan
-- starts from either, and from (0, 0) it walked the whole index, 0.7 s at 10 million rows. (Ids
-- start at 1.)
-- name: feed_sweep
SELECT q.snapshot::text, n.id, n.user_id, n.xact::text::bigint,
       newest.id, newest.xact::text::bigint
  FROM (SELECT coalesce(%(snapshot)s::pg_snapshot, pg_current_snapshot()) AS snapshot,
               %(base)s::pg_snapshot AS base) AS q
  LEFT JOIN (SELECT id, xact FROM notifications ORDER BY xact DESC, id DESC LIMIT 1)
            AS newest ON true
  LEFT JOIN LATERAL (
       (SELECT id, user_id, xact
          FROM notifications
         WHERE (xact, id) > (greatest(pg_snapshot_xmax(q.base), %(after_xact)s::text::xid8),
                             CASE WHEN pg_snapshot_xmax(q.base) <= %(after_xact)s::text::xid8
                                  THEN %(after_id)s::bigint ELSE 0 END)
           AND pg_visible_in_snapshot(xact, q.snapshot)
         ORDER BY xact, id
         LIMIT %(limit)s)
       UNION ALL
       (SELECT id, user_id, xact
          FROM notifications
         WHERE xact = ANY (ARRAY(SELECT pg_snapshot_xip(q.base)))
           AND (xact, id) > (%(after_xact)s::text::xid8, %(after_id)s::bigint)
           AND pg_visible_in_snapshot(xact, q.snapshot)
         ORDER BY xact, id
         LIMIT %(limit)s)
       ORDER BY xact, id
       LIMIT %(limit)s) AS n ON true
 ORDER BY n.xact, n.id

-- name: notifications_by_id
SELECT n.id, n.user_id, n.event_type, n.message, n.link,
       floor(extract(epoch FROM n.created_at) * 1000)::bigint, n.xact::text::bigint
  FROM unnest(%(ids)s::bigint[]) WITH ORDINALITY AS w (id, position)
  JOIN notifications n ON n.id = w.id
 ORDER BY w.position

-- Reading -----------------------------------------------------------------------------------------

-- The page and the count in one snapshot. The driver writes the parameters into the text, so the
-- planner sees which conditions there are: with only_unread the page comes from
-- notifications_unread_idx, else from notifications_user_id_idx. An event type has no index of its
-- own (every insert would pay for it): the user's rows are walked, newest first.
-- name: history
SELECT c.unread_count, n.id, n.event_type, n.message, n.link,
       floor(extract(epoch FROM n.created_at) * 1000)::bigint, n.xact::text::bigint,
       floor(extract(epoch FROM n.read_at) * 1000)::bigint
  FROM (SELECT count(*) AS unread_count
          FROM notifications WHERE user_id = %(user_id)s AND read_at IS NULL) AS c
  LEFT JOIN (SELECT *
               FROM notifications
              WHERE user_id = %(user_id)s
                AND (%(before)s::bigint IS NULL OR id < %(before)s::bigint)
                AND (%(event_type)s::text IS NULL OR event_type = %(event_type)s::text)
                AND (NOT %(only_unread)s::boolean OR read_at IS NULL)
              ORDER BY id DESC
              LIMIT %(limit)s) AS n ON true
 ORDER BY n.id DESC

-- Locked in the order of their ids: two devices may mark the same rows at once, by different plans.
-- What is left is counted without the rows that were asked for, and not by subtracting those that
-- were updated: a row that somebody else marks at this moment is unread in this snapshot and yet
-- not updated here.
-- name: mark_read_ids
WITH due AS MATERIALIZED (
    SELECT id FROM notifications
     WHERE user_id = %(user_id)s AND read_at IS NULL AND id = ANY(%(ids)s::bigint[])
     ORDER BY id
       FOR NO KEY UPDATE
), marked AS (
    UPDATE notifications n SET read_at = clock_timestamp()
      FROM due WHERE n.id = due.id
    RETURNING n.id
)
SELECT (SELECT count(*) FROM marked),
       (SELECT count(*) FROM notifications WHERE user_id = %(user_id)s AND read_at IS NULL)
       - (SELECT count(*) FROM notifications
           WHERE user_id = %(user_id)s AND read_at IS NULL AND id = ANY(%(ids)s::bigint[]))

-- name: mark_read_up_to
WITH due AS MATERIALIZED (
    SELECT id FROM notifications
     WHERE user_id = %(user_id)s AND read_at IS NULL AND id <= %(up_to)s::bigint
     ORDER BY id
       FOR NO KEY UPDATE
), marked AS (
    UPDATE notifications n SET read_at = clock_timestamp()
      FROM due WHERE n.id = due.id
    RETURNING n.id
)
SELECT (SELECT count(*) FROM marked),
       (SELECT count(*) FROM notifications
         WHERE user_id = %(user_id)s AND read_at IS NULL AND id > %(up_to)s::bigint)

-- Preferences -------------------------------------------------------------------------------------

-- name: preferences
SELECT t.name, t.description, t.required OR coalesce(p.enabled, t.enabled_by_default), t.required
  FROM event_types t
  LEFT JOIN user_preferences p ON p.user_id = %(user_id)s AND p.event_type = t.name
 ORDER BY t.name

-- All of the changes, or none if one of them is refused: a type that does not exist, or a required
-- one that is to be switched off. Decided here and not before, so that nothing can change between.
-- Answers as `preferences` does, with what was asked for, and whether it was done.
-- name: set_preferences
WITH wanted AS (
    SELECT w.event_type, w.enabled, t.name, t.required
      FROM unnest(%(event_types)s::text[], %(enabled)s::boolean[]) AS w (event_type, enabled)
      LEFT JOIN event_types t ON t.name = w.event_type
), accepted AS (
    SELECT NOT EXISTS (SELECT FROM wanted
                        WHERE name IS NULL OR (required AND NOT enabled)) AS yes
), changed AS (
    INSERT INTO user_preferences AS p (user_id, event_type, enabled)
    SELECT %(user_id)s, event_type, enabled
      FROM wanted
     WHERE (SELECT yes FROM accepted)
     ORDER BY event_type
    ON CONFLICT (user_id, event_type) DO UPDATE SET enabled = excluded.enabled
     WHERE p.enabled <> excluded.enabled
)
SELECT t.name, t.description,
       t.required OR coalesce(w.enabled, p.enabled, t.enabled_by_default), t.required,
       (SELECT yes FROM accepted)
  FROM event_types t
  LEFT JOIN wanted w ON w.name = t.name
  LEFT JOIN user_preferences p ON p.user_id = %(user_id)s AND p.event_type = t.name
 ORDER BY t.name

-- name: explicit_preferences
SELECT user_id, jsonb_object_agg(event_type, enabled)
  FROM user_preferences
 WHERE user_id = ANY(%(user_ids)s::text[])
 GROUP BY user_id

-- Publishing --------------------------------------------------------------------------------------

-- name: publish
SELECT user_id, outcome, id
  FROM publish(%(source)s, %(user_ids)s::text[], %(event_type)s, %(message)s, %(link)s)

-- name: publish_as_service
SELECT outcome, service, rate_per_minute, results
  FROM publish_as_service(%(key_hash)s, %(user_ids)s::text[], %(event_type)s, %(message)s,
                          %(link)s, %(idempotency_key)s, %(body_hash)s)

-- Services ----------------------------------------------------------------------------------------

-- A revoked service comes back under a new key.
-- name: add_service
INSERT INTO services AS s (name, key_hash, rate_per_minute)
VALUES (%(name)s, %(key_hash)s, %(rate_per_minute)s)
ON CONFLICT ON CONSTRAINT services_pkey DO UPDATE
   SET key_hash = excluded.key_hash, rate_per_minute = excluded.rate_per_minute, revoked_at = NULL
 WHERE s.revoked_at IS NOT NULL
RETURNING name

-- name: role_exists
SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = %(name)s)

-- name: revoke_service
UPDATE services SET revoked_at = clock_timestamp()
 WHERE name = %(name)s AND revoked_at IS NULL
RETURNING name

-- name: services
SELECT name, rate_per_minute, floor(extract(epoch FROM created_at) * 1000)::bigint,
       floor(extract(epoch FROM revoked_at) * 1000)::bigint
  FROM services
 ORDER BY name

-- Audit -------------------------------------------------------------------------------------------

-- name: insert_audit
INSERT INTO audit_log (actor, action, user_id, event_type, outcome, detail)
SELECT * FROM unnest(%(actors)s::text[], %(actions)s::text[], %(user_ids)s::text[],
                     %(event_types)s::text[], %(outcomes)s::text[], %(details)s::jsonb[])

-- Retention ---------------------------------------------------------------------------------------

-- One page of a walk along the primary key: whether this process may (one at a time), how many rows
-- it looked at, the last of them, how many were old, how many are gone. Rows that somebody has
-- locked are left for the next walk: waiting for them could deadlock with a user's "mark all read".
-- The commit does not wait for the disk, where writers' commits queue: what a crash brings back is
-- deleted again.
-- name: delete_old_notifications
WITH turn AS MATERIALIZED (
    SELECT pg_try_advisory_xact_lock(7095164721844) AS mine,
           set_config('synchronous_commit', 'off', true)
), page AS MATERIALIZED (
    SELECT n.id, n.created_at < statement_timestamp() - make_interval(days => s.retention_days)
               AS old
      FROM turn t
      JOIN settings s ON t.mine
     CROSS JOIN LATERAL (
           SELECT id, created_at FROM notifications
            WHERE id > %(after)s ORDER BY id LIMIT %(limit)s) AS n
), doomed AS MATERIALIZED (
    SELECT n.id FROM notifications n
     WHERE n.id = ANY (ARRAY(SELECT id FROM page WHERE old))
       FOR UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM notifications WHERE id = ANY (ARRAY(SELECT id FROM doomed)) RETURNING 1
)
SELECT (SELECT mine FROM turn), (SELECT count(*) FROM page), (SELECT max(id) FROM page),
       (SELECT count(*) FROM page WHERE old), (SELECT count(*) FROM gone)

-- name: delete_old_audit
WITH turn AS MATERIALIZED (
    SELECT pg_try_advisory_xact_lock(7095164721844) AS mine,
           set_config('synchronous_commit', 'off', true)
), page AS MATERIALIZED (
    SELECT a.id, a.at < statement_timestamp() - make_interval(days => s.retention_days) AS old
      FROM turn t
      JOIN settings s ON t.mine
     CROSS JOIN LATERAL (
           SELECT id, at FROM audit_log
            WHERE id > %(after)s ORDER BY id LIMIT %(limit)s) AS a
), gone AS (
    DELETE FROM audit_log WHERE id = ANY (ARRAY(SELECT id FROM page WHERE old)) RETURNING 1
)
SELECT (SELECT mine FROM turn), (SELECT count(*) FROM page), (SELECT max(id) FROM page),
       (SELECT count(*) FROM page WHERE old), (SELECT count(*) FROM gone)

-- name: delete_old_publications
DELETE FROM publications
 WHERE ctid = ANY (ARRAY(
       SELECT ctid FROM publications
        WHERE created_at < statement_timestamp() - interval '24 hours'
        ORDER BY created_at LIMIT %(limit)s
          FOR UPDATE SKIP LOCKED))
RETURNING 1

-- Operator ----------------------------------------------------------------------------------------

-- The newest lines of audit_trail. Not from the view: that would be sorted as a whole, by time.
-- name: recent_audit
SELECT floor(extract(epoch FROM at) * 1000)::bigint, actor, action, user_id, event_type,
       notification_id, outcome, detail
  FROM ((SELECT created_at AS at, audit_actor(source) AS actor, 'send' AS action, user_id,
                event_type, id AS notification_id, 'created' AS outcome, '{}'::jsonb AS detail
           FROM notifications ORDER BY id DESC LIMIT %(limit)s)
        UNION ALL
        (SELECT at, actor, action, user_id, event_type, notification_id, outcome, detail
           FROM audit_log ORDER BY id DESC LIMIT %(limit)s)) AS recent
 ORDER BY at DESC, notification_id DESC NULLS LAST
 LIMIT %(limit)s

-- The row, the text apart; else the audit record of why there is none; the smallest id there is,
-- and the greatest that was ever given out.
-- name: explain
SELECT n.user_id, n.event_type, audit_actor(n.source),
       floor(extract(epoch FROM n.created_at) * 1000)::bigint,
       floor(extract(epoch FROM n.read_at) * 1000)::bigint,
       floor(extract(epoch FROM a.at) * 1000)::bigint, a.actor, a.user_id, a.event_type,
       a.outcome, a.detail,
       (SELECT min(id) FROM notifications),
       pg_sequence_last_value(pg_get_serial_sequence('notifications', 'id')::regclass)
  FROM (SELECT %(id)s::bigint AS id) AS asked
  LEFT JOIN notifications n ON n.id = asked.id
  LEFT JOIN LATERAL (
       SELECT * FROM audit_log WHERE notification_id = asked.id ORDER BY id LIMIT 1) AS a ON true
