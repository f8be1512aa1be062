-- What the command line asks of the database, under the names by which sse_server/operator.py knows
-- it. Nothing here runs in a server. Tables are looked up in the first schema of the search path,
-- the one that schema.sql fills.

-- Sending -----------------------------------------------------------------------------------------

-- name: notify_users
SELECT user_id, outcome, id
  FROM notify_users(%(user_ids)s::text[], %(event_type)s, %(message)s, %(link)s)

-- Sessions ----------------------------------------------------------------------------------------

-- name: sessions
SELECT id, user_id, floor(extract(epoch FROM created_at) * 1000)::bigint,
       floor(extract(epoch FROM expires_at) * 1000)::bigint, stream
  FROM sessions
 WHERE expires_at > clock_timestamp()
   AND (%(user_id)s::text IS NULL OR user_id = %(user_id)s::text)
 ORDER BY id DESC
 LIMIT %(limit)s

-- The trigger tells every node, which ends the streams. Locked in the order of their ids, as the
-- servers do.
-- name: end_sessions
WITH due AS MATERIALIZED (
    SELECT id FROM sessions
     WHERE expires_at > clock_timestamp()
       AND (user_id = ANY(%(user_ids)s::text[]) OR id = ANY(%(ids)s::bigint[]))
     ORDER BY id
       FOR UPDATE
), ended AS (
    DELETE FROM sessions s USING due WHERE s.id = due.id RETURNING s.id, s.user_id
), audited AS (
    INSERT INTO audit_log (actor, action, user_id, outcome, detail)
    SELECT 'role:' || session_user, 'end_session', user_id, 'ok', jsonb_build_object('session', id)
      FROM ended
)
SELECT id, user_id FROM ended ORDER BY id

-- Stats -------------------------------------------------------------------------------------------

-- The number of all rows is the planner's: counting them would read the whole table.
-- name: stats_totals
SELECT (SELECT greatest(reltuples, 0)::bigint FROM pg_class WHERE oid = 'notifications'::regclass),
       (SELECT count(*) FROM notifications WHERE read_at IS NULL),
       (SELECT count(*) FROM sessions WHERE expires_at > clock_timestamp()),
       (SELECT count(DISTINCT user_id) FROM sessions WHERE expires_at > clock_timestamp()),
       (SELECT count(*) FROM services WHERE revoked_at IS NULL),
       s.feed_mode, s.polling_until > clock_timestamp(), s.retention_days, s.user_rate_per_minute,
       pg_notification_queue_usage(),
       (SELECT count(*) FROM pg_stat_activity
         WHERE datname = current_database() AND application_name = 'sse-server feed'),
       (SELECT extract(epoch FROM max(clock_timestamp() - xact_start))::float8
          FROM pg_stat_activity
         WHERE pid <> pg_backend_pid() AND backend_type = 'client backend')
  FROM settings s

-- Reads all rows of those days, and the table for them.
-- name: stats_days
SELECT to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD') AS day, event_type, count(*),
       count(*) FILTER (WHERE read_at IS NULL)
  FROM notifications
 WHERE created_at >= date_trunc('day', now() AT TIME ZONE 'UTC') AT TIME ZONE 'UTC'
                     - make_interval(days => %(days)s - 1)
 GROUP BY 1, 2
 ORDER BY 1 DESC, 2

-- name: stats_sizes
SELECT c.relname, t.relname, pg_total_relation_size(c.oid)
  FROM pg_class c
  LEFT JOIN pg_index i ON i.indexrelid = c.oid
  LEFT JOIN pg_class t ON t.oid = i.indrelid
 WHERE c.relnamespace = quote_ident(current_schema())::regnamespace
   AND coalesce(t.relname, c.relname) IN (
       'notifications', 'sessions', 'used_tokens', 'user_preferences', 'publications', 'audit_log',
       'services', 'event_types', 'settings')
   AND c.relkind IN ('r', 'i')
 ORDER BY coalesce(t.relname, c.relname), c.relkind DESC, c.relname

-- Doctor ------------------------------------------------------------------------------------------

-- name: doctor_server
SELECT pg_is_in_recovery(),
       extract(epoch FROM clock_timestamp())::float8,
       pg_notification_queue_usage(),
       (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'),
       current_setting('max_connections')::int
           - current_setting('superuser_reserved_connections')::int
           - coalesce(current_setting('reserved_connections', true)::int, 0),
       (SELECT nullif(datconnlimit, -1) FROM pg_database WHERE datname = current_database()),
       (SELECT nullif(rolconnlimit, -1) FROM pg_roles WHERE rolname = current_user),
       current_setting('autovacuum')::boolean AND current_setting('track_counts')::boolean,
       (SELECT age(datfrozenxid) FROM pg_database WHERE datname = current_database()),
       pg_has_role('pg_read_all_stats', 'MEMBER')

-- Of other roles' transactions one sees nothing without the role pg_read_all_stats. A transaction
-- that has written holds the horizon of rows and streams back, in whatever database; one that only
-- reads holds vacuum back, in its own.
-- name: doctor_transactions
SELECT pid, usename::text, coalesce(application_name, ''), coalesce(state, ''),
       extract(epoch FROM clock_timestamp() - xact_start)::float8, backend_xid IS NOT NULL
  FROM pg_stat_activity
 WHERE xact_start < clock_timestamp() - make_interval(secs => %(seconds)s)
   AND backend_type = 'client backend' AND pid <> pg_backend_pid()
   AND (backend_xid IS NOT NULL OR (backend_xmin IS NOT NULL AND datname = current_database()))
 ORDER BY xact_start

-- name: doctor_prepared
SELECT gid, owner::text, extract(epoch FROM clock_timestamp() - prepared)::float8
  FROM pg_prepared_xacts
 WHERE prepared < clock_timestamp() - make_interval(secs => %(seconds)s)
 ORDER BY prepared

-- name: doctor_slots
SELECT slot_name::text, slot_type::text,
       CASE WHEN restart_lsn IS NOT NULL AND NOT pg_is_in_recovery()
            THEN pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::bigint END
  FROM pg_replication_slots
 WHERE NOT active AND (restart_lsn IS NOT NULL OR xmin IS NOT NULL OR catalog_xmin IS NOT NULL)
 ORDER BY slot_name

-- What schema.sql makes. tgenabled: O and A fire; D is disabled, R fires on a replica only.
-- name: doctor_triggers
SELECT w.table_name, w.trigger_name, t.tgenabled::text
  FROM (VALUES
           ('notifications', 'notifications_accept'),
           ('notifications', 'notifications_announce'),
           ('notifications', 'notifications_announce_read'),
           ('user_preferences', 'user_preferences_announce'),
           ('services', 'services_audit'),
           ('sessions', 'sessions_announce_deleted'),
           ('sessions', 'sessions_announce_changed'),
           ('sessions', 'sessions_announce_truncated')
       ) AS w (table_name, trigger_name)
  LEFT JOIN pg_trigger t ON t.tgrelid = w.table_name::regclass AND t.tgname = w.trigger_name
 ORDER BY w.table_name, w.trigger_name

-- name: doctor_settings
SELECT count(*) FROM settings

-- The threshold is that of autovacuum itself, unless the table has one of its own.
-- name: doctor_tables
SELECT c.relname::text, s.n_dead_tup, greatest(c.reltuples, 0)::bigint,
       current_setting('autovacuum_vacuum_threshold')::float8
           + current_setting('autovacuum_vacuum_scale_factor')::float8 * greatest(c.reltuples, 0),
       extract(epoch FROM clock_timestamp() - greatest(s.last_vacuum, s.last_autovacuum))::float8,
       coalesce((SELECT option_value::boolean FROM pg_options_to_table(c.reloptions)
                  WHERE option_name = 'autovacuum_enabled'), true)
  FROM pg_class c
  JOIN pg_stat_user_tables s ON s.relid = c.oid
 WHERE c.relnamespace = quote_ident(current_schema())::regnamespace
   AND c.relname IN ('notifications', 'sessions', 'used_tokens', 'user_preferences',
                     'publications', 'audit_log', 'services', 'event_types', 'settings')
 ORDER BY c.relname

-- Rights that publishers do not need: to see the channel's name, keys and sessions, or to change
-- what was sent. Neither the owner's nor those of the role that is asking.
-- name: doctor_grants
SELECT CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE pg_get_userbyid(a.grantee)::text END,
       c.relname::text, string_agg(DISTINCT a.privilege_type, ', ' ORDER BY a.privilege_type)
  FROM pg_class c
 CROSS JOIN LATERAL aclexplode(c.relacl) AS a
 WHERE c.relnamespace = quote_ident(current_schema())::regnamespace
   AND a.grantee <> c.relowner
   AND (a.grantee = 0 OR NOT pg_has_role(a.grantee, 'USAGE'))
   AND (c.relname IN ('settings', 'sessions', 'services', 'used_tokens', 'publications')
        OR c.relname = 'notifications'
           AND a.privilege_type IN ('INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'TRIGGER'))
 GROUP BY 1, 2
 ORDER BY 1, 2

-- Of the rows with the smallest ids: those that retention should have deleted a day ago.
-- name: doctor_retention
SELECT count(n.created_at), s.retention_days,
       floor(extract(epoch FROM min(n.created_at)) * 1000)::bigint
  FROM settings s
  LEFT JOIN (SELECT created_at FROM notifications ORDER BY id LIMIT %(limit)s) AS n
       ON n.created_at < clock_timestamp() - make_interval(days => s.retention_days + 1)
 GROUP BY s.retention_days
