-- Schema of sse-server. Idempotent: applying it again changes nothing and loses nothing.
--
-- Everything is created in the first schema of the search path, so that the service can live in
-- a schema of its own inside a database that others use. PostgreSQL 13 or later, UTF8.
--
-- Sections: preconditions, tables, indexes, views, functions, triggers, privileges.
--
-- A role that may publish and nothing else (SQL writers need no more than this):
--
--     CREATE ROLE publisher LOGIN;
--     GRANT USAGE ON SCHEMA ... TO publisher;
--     GRANT INSERT (user_id, event_type, message, link) ON notifications TO publisher;
--     GRANT EXECUTE ON FUNCTION notify_user(text, text, text, text),
--                               notify_users(text[], text, text, text) TO publisher;
--
-- A role that may read the audit trail and nothing else:
--
--     CREATE ROLE auditor LOGIN;
--     GRANT USAGE ON SCHEMA ... TO auditor;
--     GRANT SELECT ON audit_trail TO auditor;

BEGIN;

-- Several processes may start at once; "CREATE ... IF NOT EXISTS" alone is not safe against that.
SELECT pg_advisory_xact_lock(7095164721843);

---------------------------------------------------------------------------------------------------
-- Preconditions
---------------------------------------------------------------------------------------------------

DO $$
BEGIN
    IF current_setting('server_version_num')::int < 130000 THEN
        RAISE EXCEPTION 'sse-server needs PostgreSQL 13 or later, this is %',
            current_setting('server_version');
    END IF;
    -- Payloads of NOTIFY travel in the server's encoding.
    IF current_setting('server_encoding') <> 'UTF8' THEN
        RAISE EXCEPTION 'sse-server needs a database with encoding UTF8, this one has %',
            current_setting('server_encoding');
    END IF;
    IF current_schema() IS NULL THEN
        RAISE EXCEPTION 'the search path names no schema that exists: %',
            current_setting('search_path');
    END IF;
    -- The functions below keep this search path (SET search_path FROM CURRENT). pg_temp goes last:
    -- left out it would come first, and a temporary table of the caller's could stand in for ours.
    PERFORM set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);
END
$$;

-- Tables of the same names that are somebody else's would be taken for ours by IF NOT EXISTS.
DO $$
DECLARE
    ours record;
BEGIN
    FOR ours IN
        SELECT * FROM (VALUES
            ('event_types', 'enabled_by_default'), ('notifications', 'horizon'),
            ('user_preferences', 'event_type'), ('sessions', 'key_hash'),
            ('used_tokens', 'token_hash'), ('services', 'key_hash'),
            ('settings', 'user_rate_per_minute'),
            ('publications', 'body_hash'), ('audit_log', 'notification_id')
        ) AS t (table_name, column_name)
    LOOP
        IF to_regclass(ours.table_name) IS NOT NULL AND NOT EXISTS (
            SELECT FROM pg_attribute
             WHERE attrelid = to_regclass(ours.table_name) AND attname = ours.column_name)
        THEN
            RAISE EXCEPTION 'the schema % has a table % that is not sse-server''s; give sse-server '
                'a schema of its own and name it in the connection''s search_path',
                current_schema(), ours.table_name;
        END IF;
    END LOOP;
END
$$;

---------------------------------------------------------------------------------------------------
-- Tables
---------------------------------------------------------------------------------------------------

CREATE TABLE IF NOT EXISTS event_types (
    name               text    NOT NULL,
    description        text    NOT NULL DEFAULT '',
    enabled_by_default boolean NOT NULL DEFAULT true,
    required           boolean NOT NULL DEFAULT false,  -- users cannot switch it off
    CONSTRAINT event_types_pkey PRIMARY KEY (name),
    CONSTRAINT event_types_name_format CHECK (name ~ '^[a-z][a-z0-9_]{0,62}$')
);

CREATE TABLE IF NOT EXISTS notifications (
    -- From the sequence, in order (no cache, never given by the writer): replays rely on it.
    id         bigint      GENERATED ALWAYS AS IDENTITY (CACHE 1),
    user_id    text        NOT NULL,
    event_type text        NOT NULL,  -- checked by notifications_accept(): a foreign key would
                                      -- lock one of three rows in every insert
    message    text        NOT NULL,
    link       text,
    created_at timestamptz NOT NULL DEFAULT date_trunc('milliseconds', clock_timestamp()),
    read_at    timestamptz,
    source     text        NOT NULL DEFAULT session_user,
    -- The transaction that wrote the row, and the oldest one that was still running then: whoever
    -- has received this row has also been sent every row with xact < horizon. Both must come from
    -- the statement's own snapshot, hence defaults and not the trigger (docs/guarantees.md).
    xact       xid8        NOT NULL DEFAULT pg_current_xact_id(),
    horizon    xid8        NOT NULL DEFAULT pg_snapshot_xmin(pg_current_snapshot()),
    CONSTRAINT notifications_pkey PRIMARY KEY (id),
    CONSTRAINT notifications_user_id_format
        CHECK (octet_length(user_id) BETWEEN 1 AND 255 AND user_id !~ '[[:cntrl:]]'),
    CONSTRAINT notifications_message_length CHECK (char_length(message) BETWEEN 1 AND 2000),
    CONSTRAINT notifications_link_length CHECK (char_length(link) BETWEEN 1 AND 2048),
    -- Infinity and years of five digits have no ISO 8601 form: no replay could pass such a row.
    CONSTRAINT notifications_times_range CHECK (
        created_at >= '1970-01-01 00:00:00+00' AND created_at < '9999-12-31 00:00:00+00'
        AND (read_at IS NULL
             OR read_at >= '1970-01-01 00:00:00+00' AND read_at < '9999-12-31 00:00:00+00'))
);

CREATE TABLE IF NOT EXISTS user_preferences (
    user_id    text    NOT NULL,
    event_type text    NOT NULL,
    enabled    boolean NOT NULL,
    CONSTRAINT user_preferences_pkey PRIMARY KEY (user_id, event_type),
    CONSTRAINT user_preferences_event_type_fkey FOREIGN KEY (event_type)
        REFERENCES event_types (name) ON UPDATE CASCADE ON DELETE CASCADE,
    CONSTRAINT user_preferences_user_id_format
        CHECK (octet_length(user_id) BETWEEN 1 AND 255 AND user_id !~ '[[:cntrl:]]')
);

CREATE TABLE IF NOT EXISTS sessions (
    id         bigint      GENERATED ALWAYS AS IDENTITY,
    key_hash   bytea       NOT NULL,  -- SHA-256 of the cookie's key; the key itself is nowhere
    user_id    text        NOT NULL,
    data       jsonb       NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz NOT NULL,
    -- Counts the streams that this session has opened: the highest number is the one that counts,
    -- on whatever node it is; all others are superseded.
    stream     bigint      NOT NULL DEFAULT 0,
    -- When that one was opened; null once it has ended. A node that dies leaves it behind, so it
    -- counts for no longer than a stream may last.
    stream_at  timestamptz,
    CONSTRAINT sessions_pkey PRIMARY KEY (id),
    CONSTRAINT sessions_key_hash_key UNIQUE (key_hash),
    CONSTRAINT sessions_key_hash_length CHECK (octet_length(key_hash) = 32),
    CONSTRAINT sessions_times_finite CHECK (isfinite(created_at) AND isfinite(expires_at)),
    CONSTRAINT sessions_user_id_format
        CHECK (octet_length(user_id) BETWEEN 1 AND 255 AND user_id !~ '[[:cntrl:]]')
);

-- Looked for first: ADD COLUMN IF NOT EXISTS waits for every reader, even if there is nothing to do.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_attribute
                    WHERE attrelid = 'sessions'::regclass AND attname = 'stream_at') THEN
        ALTER TABLE sessions ADD COLUMN stream_at timestamptz;
    END IF;
END
$$;

-- Sign-in tokens that have become a session: each works once, on whatever node.
CREATE TABLE IF NOT EXISTS used_tokens (
    token_hash bytea       NOT NULL,  -- SHA-256 of the token's issuer and jti
    expires_at timestamptz NOT NULL,  -- an hour after the token's own expiry
    CONSTRAINT used_tokens_pkey PRIMARY KEY (token_hash),
    CONSTRAINT used_tokens_token_hash_length CHECK (octet_length(token_hash) = 32)
);

CREATE TABLE IF NOT EXISTS services (
    name            text        NOT NULL,
    key_hash        bytea       NOT NULL,  -- SHA-256; the key is shown once and kept nowhere
    rate_per_minute integer     NOT NULL DEFAULT 600,
    created_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    revoked_at      timestamptz,
    CONSTRAINT services_pkey PRIMARY KEY (name),
    CONSTRAINT services_key_hash_key UNIQUE (key_hash),
    CONSTRAINT services_key_hash_length CHECK (octet_length(key_hash) = 32),
    CONSTRAINT services_name_format CHECK (name ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$'),
    CONSTRAINT services_rate_positive CHECK (rate_per_minute > 0)
);

-- What was answered to requests with an idempotency key. A row counts for 24 hours.
CREATE TABLE IF NOT EXISTS publications (
    service         text        NOT NULL,
    idempotency_key text        NOT NULL,
    body_hash       bytea       NOT NULL,
    results         json,                  -- [[user_id, outcome, id], ...]
    created_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT publications_pkey PRIMARY KEY (service, idempotency_key),
    CONSTRAINT publications_body_hash_length CHECK (octet_length(body_hash) = 32)
);

-- All that is audited but the notifications that were created: those are their own record, and
-- a second row for each would double what an INSERT costs. The view audit_trail has both.
CREATE TABLE IF NOT EXISTS audit_log (
    id              bigint      GENERATED ALWAYS AS IDENTITY,
    at              timestamptz NOT NULL DEFAULT clock_timestamp(),
    actor           text        NOT NULL,  -- service:NAME, role:NAME, user:ID, address:IP
    action          text        NOT NULL,
    user_id         text,
    event_type      text,
    notification_id bigint,
    outcome         text        NOT NULL,
    detail          jsonb       NOT NULL DEFAULT '{}',
    CONSTRAINT audit_log_pkey PRIMARY KEY (id)
);

CREATE TABLE IF NOT EXISTS settings (
    only_row             boolean NOT NULL DEFAULT true,
    user_rate_per_minute integer NOT NULL DEFAULT 100,  -- 0: no limit
    retention_days       integer NOT NULL DEFAULT 30,
    -- Whoever knows the channel can listen to everybody's notifications, and NOTIFY what nobody
    -- wrote: PostgreSQL asks for no right. So its name is a secret, as this table is.
    channel              text    NOT NULL
                                 DEFAULT 'sse_' || replace(gen_random_uuid()::text, '-', ''),
    -- How rows reach the feeds: by 'notify', by 'poll', or ('auto') by whichever suits the load.
    -- Commits that notify wait for one another in the whole cluster; feeds that poll need none.
    feed_mode            text    NOT NULL DEFAULT 'auto',
    -- Until then all feeds poll, and nobody needs to notify. They prolong it; if they die, it ends.
    polling_until        timestamptz NOT NULL DEFAULT '-infinity',
    CONSTRAINT settings_pkey PRIMARY KEY (only_row),
    CONSTRAINT settings_only_row CHECK (only_row),
    CONSTRAINT settings_channel_format CHECK (channel ~ '^[a-z0-9_]{8,63}$'),
    CONSTRAINT settings_feed_mode_known CHECK (feed_mode IN ('auto', 'notify', 'poll')),
    CONSTRAINT settings_user_rate_not_negative CHECK (user_rate_per_minute >= 0),
    CONSTRAINT settings_retention_positive CHECK (retention_days > 0)
);

INSERT INTO settings DEFAULT VALUES ON CONFLICT DO NOTHING;

INSERT INTO event_types (name, description) VALUES
    ('new_message',   'Somebody wrote to you'),
    ('status_change', 'Something you follow has a new status'),
    ('system_alert',  'News about the service itself')
ON CONFLICT DO NOTHING;

---------------------------------------------------------------------------------------------------
-- Indexes (each with the query in sse_server/queries.sql that it serves)
---------------------------------------------------------------------------------------------------

-- history; notifications_accept(): the n-th newest row of a user.
CREATE INDEX IF NOT EXISTS notifications_user_id_idx ON notifications (user_id, id);
-- replay, unread_count, mark_read_*. xact is in the key so that the condition on it is decided in
-- the index, without a visit to the heap for every older unread row.
CREATE INDEX IF NOT EXISTS notifications_unread_idx ON notifications (user_id, id, xact)
    WHERE read_at IS NULL;
-- feed_sweep, in the order in which it pages.
CREATE INDEX IF NOT EXISTS notifications_xact_idx ON notifications (xact, id);
-- delete_expired_sessions.
CREATE INDEX IF NOT EXISTS sessions_expires_at_idx ON sessions (expires_at);
-- delete_expired_sessions.
CREATE INDEX IF NOT EXISTS used_tokens_expires_at_idx ON used_tokens (expires_at);
-- sessions_of_user.
CREATE INDEX IF NOT EXISTS sessions_user_id_idx ON sessions (user_id);

-- delete_old_publications.
CREATE INDEX IF NOT EXISTS publications_created_at_idx ON publications (created_at);
-- audit_trail: what happened to a user.
CREATE INDEX IF NOT EXISTS audit_log_user_id_idx ON audit_log (user_id, id)
    WHERE user_id IS NOT NULL;

-- explain.
CREATE INDEX IF NOT EXISTS audit_log_notification_id_idx ON audit_log (notification_id)
    WHERE notification_id IS NOT NULL;

---------------------------------------------------------------------------------------------------
-- Views
---------------------------------------------------------------------------------------------------

-- Who did what, to whom, when, and what came of it; never the text.
CREATE OR REPLACE VIEW audit_trail AS
    SELECT n.created_at AS at,
           CASE WHEN s.name IS NOT NULL THEN 'service:' || n.source
                WHEN n.source LIKE 'demo:%' THEN n.source
                ELSE 'role:' || n.source END AS actor,
           'send' AS action, n.user_id, n.event_type, n.id AS notification_id,
           'created' AS outcome, '{}'::jsonb AS detail
      FROM notifications n
      LEFT JOIN services s ON s.name = n.source
     UNION ALL
    SELECT a.at, a.actor, a.action, a.user_id, a.event_type, a.notification_id, a.outcome, a.detail
      FROM audit_log a;

---------------------------------------------------------------------------------------------------
-- Functions
--
-- SECURITY DEFINER, so that a publisher needs no right but INSERT; with a search path of their
-- own, so that the writer's may be any other.
---------------------------------------------------------------------------------------------------

-- How the audit names the source of a notification, as in the view audit_trail.
CREATE OR REPLACE FUNCTION audit_actor(source text) RETURNS text
    LANGUAGE plpgsql STABLE SET search_path FROM CURRENT AS $$
BEGIN
    RETURN CASE WHEN EXISTS (SELECT FROM services s WHERE s.name = source) THEN 'service:' || source
                WHEN source LIKE 'demo:%' THEN source
                ELSE 'role:' || source END;
END
$$;

-- The audit record of a send that is rejected, as one line of JSON.
CREATE OR REPLACE FUNCTION audit_record(
    source text, user_id text, event_type text, outcome text) RETURNS text
    LANGUAGE plpgsql STABLE SET search_path FROM CURRENT AS $$
BEGIN
    RETURN 'audit: ' || json_build_object(
        'action', 'send', 'actor', audit_actor(source), 'user_id', left(user_id, 255),
        'event_type', left(event_type, 100), 'outcome', outcome);
END
$$;

-- Decides on each row before it is written: known type? wanted by the user? within the rate?
--
-- Rejections: SQLSTATE 23503 (unknown event type), SR429 (rate limit). A row that the user has
-- switched off is skipped in silence: the INSERT succeeds with one row less.
--
-- What is skipped is audited here. A rejection undoes its transaction, and a row of audit_log would
-- go with it; it bears its audit record as DETAIL, which PostgreSQL writes to the server's log.
CREATE OR REPLACE FUNCTION notifications_accept() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    wanted boolean;
    rate   integer;
    -- When the rate-th newest row of this user was written; VOLATILE, so that rows which this very
    -- statement has inserted count.
    nth    timestamptz;
    result text;
BEGIN
    SELECT t.required OR coalesce(p.enabled, t.enabled_by_default),
           s.user_rate_per_minute,
           CASE WHEN s.user_rate_per_minute > 0 THEN (
               SELECT n.created_at
                 FROM notifications n
                WHERE n.user_id = NEW.user_id
                ORDER BY n.id DESC
               OFFSET s.user_rate_per_minute - 1
                LIMIT 1)
           END
      INTO wanted, rate, nth
      FROM event_types t
      LEFT JOIN settings s ON true
      LEFT JOIN user_preferences p ON p.user_id = NEW.user_id AND p.event_type = t.name
     WHERE t.name = NEW.event_type;

    IF NOT FOUND THEN
        RAISE EXCEPTION USING
            ERRCODE = 'foreign_key_violation',
            MESSAGE = format('unknown event type %L', left(NEW.event_type, 100)),
            HINT    = 'Known event types: '
                      || (SELECT string_agg(name, ', ' ORDER BY name) FROM event_types)
                      || '. Add one with INSERT INTO event_types.',
            DETAIL  = audit_record(NEW.source, NEW.user_id, NEW.event_type, 'unknown_event_type');
    END IF;
    IF NOT wanted THEN
        result := 'suppressed';
    ELSIF nth > clock_timestamp() - interval '1 minute' THEN
        -- notify_users() reports it for the recipient; a plain INSERT fails.
        IF current_setting('sse_server.over_limit', true) IS DISTINCT FROM 'skip' THEN
            RAISE EXCEPTION USING
                ERRCODE = 'SR429',
                MESSAGE = format('user %L has had %s notifications within the last minute',
                                 NEW.user_id, rate),
                HINT    = 'Try again later, or use notify_users(), which reports it per recipient.',
                DETAIL  = audit_record(NEW.source, NEW.user_id, NEW.event_type, 'rate_limited');
        END IF;
        result := 'rate_limited';
    ELSE
        RETURN NEW;
    END IF;
    -- The id is used up, and by it operators ask what became of the notification.
    INSERT INTO audit_log (actor, action, user_id, event_type, notification_id, outcome, detail)
    VALUES (audit_actor(NEW.source), 'send', left(NEW.user_id, 255), NEW.event_type, NEW.id, result,
            CASE WHEN result <> 'suppressed' THEN '{}'
                 WHEN EXISTS (SELECT FROM user_preferences p
                               WHERE p.user_id = NEW.user_id AND p.event_type = NEW.event_type)
                 THEN '{"preference": "user"}'
                 ELSE '{"preference": "default"}' END::jsonb);
    RETURN NULL;
END
$$;

-- The feeds' channel. Should somebody have deleted the one row of settings, nobody listens, but no
-- writer's transaction fails.
CREATE OR REPLACE FUNCTION feed_channel() RETURNS text
    LANGUAGE sql STABLE SET search_path FROM CURRENT AS $$
    SELECT coalesce((SELECT channel FROM settings), 'sse_nobody');
$$;

-- Announces the rows of one statement, grouped by content: {"t", "x", "e", "m", "l", "r"}, where r
-- lists [id, user_id, created_at in ms] and x is the transaction. Rows whose content is too large
-- for a payload (8,000 bytes and no more, or the writer's transaction fails) are announced without
-- it; the feed fetches them.
--
-- A payload is cut when its recipients exceed 7,300 bytes less its head. One recipient is at most
-- 560 bytes (user_id of 255, each byte escaped), so no payload exceeds 7,900.
CREATE OR REPLACE FUNCTION notifications_announce() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    feed record;
BEGIN
    SELECT channel, polling_until > clock_timestamp() AS polls INTO feed FROM settings;
    -- READ COMMITTED only: an older snapshot could still show a time of polling that is over.
    IF NOT FOUND
       OR feed.polls AND current_setting('transaction_isolation') = 'read committed' THEN
        RETURN NULL;
    END IF;
    PERFORM pg_notify(feed.channel, payload)
       FROM (SELECT head || string_agg(recipient, ',' ORDER BY id) || ']}' AS payload
               FROM (SELECT id, head, recipient,
                            sum(octet_length(recipient) + 1) OVER (PARTITION BY head ORDER BY id)
                                / (7300 - octet_length(head)) AS part
                       FROM (SELECT id, recipient,
                                    CASE WHEN octet_length(content) <= 4000
                                         THEN start || content || ',"r":['
                                         ELSE start || ',"r":['
                                    END AS head
                               FROM (SELECT id,
                                            '{"t":"notification","x":' || xact AS start,
                                            ',"e":' || to_json(event_type)
                                                || ',"m":' || to_json(message)
                                                || ',"l":' || coalesce(to_json(link)::text, 'null')
                                                AS content,
                                            '[' || id || ',' || to_json(user_id) || ','
                                                || floor(extract(epoch FROM created_at) * 1000)
                                                || ']' AS recipient
                                       FROM new_rows) AS written) AS headed) AS sized
              GROUP BY head, part
              ORDER BY min(id)) AS payloads;
    RETURN NULL;
END
$$;

-- Announces what has been marked read: {"t": "read", "r": [[user_id, [ids]] or
-- [user_id, null, up_to]]}. More than 100 rows of a user become "up_to" if no unread row is left
-- below, else several lists.
CREATE OR REPLACE FUNCTION notifications_announce_read() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
BEGIN
    PERFORM pg_notify(feed_channel(),
                      '{"t":"read","r":[' || string_agg(entry, ',') || ']}')
       FROM (SELECT entry,
                    sum(octet_length(entry) + 1) OVER (ORDER BY user_id, up_to) / 5000 AS part
               FROM (SELECT user_id, max(id) AS up_to,
                            '[' || to_json(user_id) || ','
                                || CASE WHEN everything THEN 'null,' || max(id)
                                        ELSE '[' || string_agg(id::text, ',' ORDER BY id) || ']' END
                                || ']' AS entry
                       FROM (SELECT user_id, id, everything,
                                    CASE WHEN NOT everything THEN (nth - 1) / 100 END AS list
                               FROM (SELECT user_id, id, nth,
                                            bool_or(none_left) OVER (PARTITION BY user_id)
                                                AS everything
                                       FROM (SELECT user_id, id, nth,
                                                    -- One look for each user, not one for each row:
                                                    -- it passes over the index entries of all that
                                                    -- this statement has marked.
                                                    CASE WHEN nth = 1 AND total > 100 THEN
                                                        NOT EXISTS (
                                                            SELECT FROM notifications u
                                                             WHERE u.user_id = counted.user_id
                                                               AND u.read_at IS NULL
                                                               AND u.id <= counted.up_to)
                                                    ELSE false END AS none_left
                                               FROM (SELECT user_id, id,
                                                            row_number() OVER w AS nth,
                                                            count(*) OVER u AS total,
                                                            max(id) OVER u AS up_to
                                                       -- No join: its plan would be that of the
                                                       -- session's first statement, a nested loop.
                                                       FROM (SELECT user_id, id FROM new_rows
                                                              WHERE read_at IS NOT NULL
                                                             EXCEPT
                                                             SELECT user_id, id FROM old_rows
                                                              WHERE read_at IS NOT NULL) AS marked
                                                     WINDOW u AS (PARTITION BY user_id),
                                                            w AS (PARTITION BY user_id ORDER BY id)
                                                    ) AS counted) AS judged) AS told) AS listed
                      GROUP BY user_id, list, everything) AS entries) AS parted
      GROUP BY part;
    RETURN NULL;
END
$$;

-- Announces a changed preference: {"t": "preferences", "u": user_id, "p": {event_type: enabled}}.
CREATE OR REPLACE FUNCTION user_preferences_announce() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    changed user_preferences := NEW;
BEGIN
    IF TG_OP = 'DELETE' THEN
        changed := OLD;
        -- Back to the default. When the type itself is going, there is nothing left to tell.
        SELECT t.enabled_by_default INTO changed.enabled
          FROM event_types t WHERE t.name = OLD.event_type;
        IF NOT FOUND THEN
            RETURN NULL;
        END IF;
    ELSIF TG_OP = 'UPDATE' AND OLD.enabled = NEW.enabled THEN
        RETURN NULL;
    END IF;
    PERFORM pg_notify(
        feed_channel(),
        json_build_object('t', 'preferences', 'u', changed.user_id,
                          'p', json_build_object(changed.event_type, changed.enabled))::text);
    RETURN NULL;
END
$$;

-- Announces sessions that have ended or now end sooner: {"t": "session", "s": [[id, ms left]]};
-- null for "s" after a TRUNCATE: look for yourself.
CREATE OR REPLACE FUNCTION sessions_announce() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    channel text := feed_channel();
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        PERFORM pg_notify(channel, '{"t":"session","s":null}');
    ELSIF TG_OP = 'DELETE' THEN
        PERFORM pg_notify(channel, '{"t":"session","s":[' || string_agg(entry, ',') || ']}')
           FROM (SELECT '[' || id || ',0]' AS entry, (row_number() OVER () - 1) / 300 AS part
                   FROM old_rows) AS entries
          GROUP BY part;
    ELSE
        PERFORM pg_notify(
            channel,
            format('{"t":"session","s":[[%s,%s]]}', NEW.id,
                   CASE WHEN NEW.user_id <> OLD.user_id THEN 0
                        ELSE greatest(0, floor(1000 * extract(
                                 epoch FROM NEW.expires_at - clock_timestamp()))) END));
    END IF;
    RETURN NULL;
END
$$;

-- Rows that were restored from another cluster can carry transaction ids that this one has not
-- reached yet; a client that comes back with such a row's id would miss everything new. They are
-- set back to the oldest value (3, the first there is): a replay after them repeats too much and
-- misses nothing.
-- Called when the schema is applied and whenever a feed connects.
CREATE OR REPLACE FUNCTION reset_foreign_xacts() RETURNS void
    LANGUAGE sql SET search_path FROM CURRENT AS $$
    UPDATE notifications SET xact = '3', horizon = '3'
     WHERE xact >= pg_snapshot_xmax(pg_current_snapshot());
$$;

-- What notify_user() and notify_users() do, in the name of a source. Not for publishers, who may
-- not write in another's name.
CREATE OR REPLACE FUNCTION publish(
    source text, user_ids text[], event_type text, message text, link text)
    RETURNS TABLE (user_id text, outcome text, id bigint)
    LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
#variable_conflict use_column
DECLARE
    before text := coalesce(current_setting('sse_server.over_limit', true), '');
BEGIN
    -- Not as a SET of the function: for that only a superuser has the right.
    PERFORM set_config('sse_server.over_limit', 'skip', true);
    -- Said once and for all recipients, even if all of them are suppressed.
    IF NOT EXISTS (SELECT FROM event_types t WHERE t.name = publish.event_type) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'foreign_key_violation',
            MESSAGE = format('unknown event type %L', left(publish.event_type, 100)),
            HINT    = 'Known event types: '
                      || (SELECT string_agg(t.name, ', ' ORDER BY t.name) FROM event_types t)
                      || '. Add one with INSERT INTO event_types.';
    END IF;
    RETURN QUERY
    WITH recipients AS (
        SELECT r.user_id, min(r.position) AS position
          FROM unnest(publish.user_ids) WITH ORDINALITY AS r (user_id, position)
         GROUP BY r.user_id
    ), created AS (
        INSERT INTO notifications AS n (user_id, event_type, message, link, source)
        SELECT r.user_id, publish.event_type, publish.message, publish.link, publish.source
          FROM recipients r
         ORDER BY r.position
        RETURNING n.user_id, n.id
    )
    SELECT r.user_id,
           CASE WHEN c.id IS NOT NULL THEN 'created'
                WHEN t.required OR coalesce(p.enabled, t.enabled_by_default) THEN 'rate_limited'
                ELSE 'suppressed' END,
           c.id
      FROM recipients r
      JOIN event_types t ON t.name = publish.event_type
      LEFT JOIN created c ON c.user_id = r.user_id
      LEFT JOIN user_preferences p ON p.user_id = r.user_id AND p.event_type = t.name
     ORDER BY r.position;
    -- Up to here it was materialised. An INSERT of the caller's own is rejected again.
    PERFORM set_config('sse_server.over_limit', before, true);
END
$$;

-- Like an INSERT, but reports what became of it instead of failing: outcome is 'created' (with the
-- id), 'suppressed' (the user has switched the type off) or 'rate_limited'.
CREATE OR REPLACE FUNCTION notify_users(
    user_ids text[], event_type text, message text, link text DEFAULT NULL)
    RETURNS TABLE (user_id text, outcome text, id bigint)
    LANGUAGE sql SECURITY DEFINER SET search_path FROM CURRENT AS $$
    SELECT * FROM publish(session_user::text, user_ids, event_type, message, link);
$$;

-- notify_users() for one recipient.
CREATE OR REPLACE FUNCTION notify_user(
    user_id text, event_type text, message text, link text DEFAULT NULL)
    RETURNS TABLE (outcome text, id bigint)
    LANGUAGE sql SECURITY DEFINER SET search_path FROM CURRENT AS $$
    SELECT p.outcome, p.id
      FROM publish(session_user::text, ARRAY[user_id], event_type, message, link) AS p;
$$;

-- publish() for POST /api/publish: who is asking, has this been asked before, and the sending, in
-- one call. For the server alone.
--
-- outcome is one of
--   published           results: [[user_id, outcome, id], ...]
--   repeated            the same request within 24 hours; results are those of the first
--   conflict            another request with the same idempotency key
--   unknown_event_type  results: the known ones
--   unknown_key, revoked_key
CREATE OR REPLACE FUNCTION publish_as_service(
    key_hash bytea, user_ids text[], event_type text, message text, link text,
    idempotency_key text, body_hash bytea)
    RETURNS TABLE (outcome text, service text, rate_per_minute integer, results json)
    LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
#variable_conflict use_column
DECLARE
    asking services;
    stored publications;
BEGIN
    SELECT * INTO asking FROM services s WHERE s.key_hash = publish_as_service.key_hash;
    service := asking.name;
    rate_per_minute := asking.rate_per_minute;
    IF asking.name IS NULL OR asking.revoked_at IS NOT NULL THEN
        outcome := CASE WHEN asking.name IS NULL THEN 'unknown_key' ELSE 'revoked_key' END;
        RETURN NEXT;
        RETURN;
    END IF;

    WHILE idempotency_key IS NOT NULL LOOP
        -- Of several that come at once, on whatever node, one inserts; the others wait here until
        -- it has committed, and then read what it has answered.
        INSERT INTO publications AS p (service, idempotency_key, body_hash)
        VALUES (asking.name, publish_as_service.idempotency_key, publish_as_service.body_hash)
        ON CONFLICT ON CONSTRAINT publications_pkey DO UPDATE
           SET body_hash = excluded.body_hash, results = NULL, created_at = excluded.created_at
         WHERE p.created_at < clock_timestamp() - interval '24 hours';
        EXIT WHEN FOUND;
        SELECT * INTO stored
          FROM publications p
         WHERE p.service = asking.name
           AND p.idempotency_key = publish_as_service.idempotency_key;
        IF FOUND THEN
            IF stored.body_hash = publish_as_service.body_hash THEN
                outcome := 'repeated';
                results := stored.results;
            ELSE
                outcome := 'conflict';
            END IF;
            RETURN NEXT;
            RETURN;
        END IF;
        -- Deleted as too old in between: it is free again.
    END LOOP;

    IF NOT EXISTS (SELECT FROM event_types t WHERE t.name = publish_as_service.event_type) THEN
        -- Nothing was sent: the key may be used again, with a body that is right.
        DELETE FROM publications p
         WHERE p.service = asking.name
           AND p.idempotency_key = publish_as_service.idempotency_key;
        outcome := 'unknown_event_type';
        results := (SELECT json_agg(t.name ORDER BY t.name) FROM event_types t);
        RETURN NEXT;
        RETURN;
    END IF;

    outcome := 'published';
    SELECT json_agg(json_build_array(sent.user_id, sent.outcome, sent.id)) INTO results
      FROM publish(asking.name, publish_as_service.user_ids, publish_as_service.event_type,
                   publish_as_service.message, publish_as_service.link) AS sent;
    IF idempotency_key IS NOT NULL THEN
        UPDATE publications p SET results = publish_as_service.results
         WHERE p.service = asking.name
           AND p.idempotency_key = publish_as_service.idempotency_key;
    END IF;
    RETURN NEXT;
END
$$;

-- Audits every change of a service's key, whoever makes it and however.
CREATE OR REPLACE FUNCTION services_audit() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    changed services := coalesce(NEW, OLD);
    action  text := 'service_changed';
BEGIN
    IF TG_OP = 'INSERT' THEN
        action := 'service_added';
    ELSIF TG_OP = 'DELETE' THEN
        action := 'service_deleted';
    ELSIF NEW IS NOT DISTINCT FROM OLD THEN
        RETURN NULL;
    ELSIF NEW.key_hash <> OLD.key_hash THEN
        action := 'service_added';  -- again, under a new key
    ELSIF NEW.revoked_at IS NOT NULL AND OLD.revoked_at IS NULL THEN
        action := 'service_revoked';
    END IF;
    INSERT INTO audit_log (actor, action, outcome, detail)
    VALUES ('role:' || session_user, action, 'ok',
            jsonb_build_object('service', changed.name,
                               'rate_per_minute', changed.rate_per_minute));
    RETURN NULL;
END
$$;

---------------------------------------------------------------------------------------------------
-- Triggers
--
-- Created only where they are missing: CREATE OR REPLACE TRIGGER is new in PostgreSQL 14, and
-- dropping one waits for every writer.
---------------------------------------------------------------------------------------------------

DO $$
DECLARE
    wanted record;
BEGIN
    FOR wanted IN
        SELECT * FROM (VALUES
            ('notifications', 'notifications_accept',
             'BEFORE INSERT ON notifications
              FOR EACH ROW EXECUTE FUNCTION notifications_accept()'),
            ('notifications', 'notifications_announce',
             'AFTER INSERT ON notifications REFERENCING NEW TABLE AS new_rows
              FOR EACH STATEMENT EXECUTE FUNCTION notifications_announce()'),
            ('notifications', 'notifications_announce_read',
             'AFTER UPDATE ON notifications REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
              FOR EACH STATEMENT EXECUTE FUNCTION notifications_announce_read()'),
            ('user_preferences', 'user_preferences_announce',
             'AFTER INSERT OR UPDATE OR DELETE ON user_preferences
              FOR EACH ROW EXECUTE FUNCTION user_preferences_announce()'),
            ('services', 'services_audit',
             'AFTER INSERT OR UPDATE OR DELETE ON services
              FOR EACH ROW EXECUTE FUNCTION services_audit()'),
            ('sessions', 'sessions_announce_deleted',
             'AFTER DELETE ON sessions REFERENCING OLD TABLE AS old_rows
              FOR EACH STATEMENT EXECUTE FUNCTION sessions_announce()'),
            ('sessions', 'sessions_announce_changed',
             'AFTER UPDATE ON sessions FOR EACH ROW
              WHEN (NEW.expires_at < OLD.expires_at OR NEW.user_id <> OLD.user_id)
              EXECUTE FUNCTION sessions_announce()'),
            ('sessions', 'sessions_announce_truncated',
             'AFTER TRUNCATE ON sessions
              FOR EACH STATEMENT EXECUTE FUNCTION sessions_announce()')
        ) AS t (table_name, trigger_name, definition)
    LOOP
        IF NOT EXISTS (SELECT FROM pg_trigger
                        WHERE tgrelid = wanted.table_name::regclass
                          AND tgname = wanted.trigger_name) THEN
            EXECUTE format('CREATE TRIGGER %I %s', wanted.trigger_name, wanted.definition);
        END IF;
    END LOOP;
END
$$;

---------------------------------------------------------------------------------------------------
-- Privileges
---------------------------------------------------------------------------------------------------

-- Functions may be executed by everybody unless one says otherwise; these write.
REVOKE ALL ON FUNCTION publish(text, text[], text, text, text),
                       notify_users(text[], text, text, text),
                       notify_user(text, text, text, text),
                       publish_as_service(bytea, text[], text, text, text, text, bytea),
                       feed_channel(), reset_foreign_xacts() FROM PUBLIC;

SELECT reset_foreign_xacts();

COMMIT;
