/** A notification as the service sends it. */
export interface Notification {
  readonly id: number;
  readonly event_type: string;
  /** Plain text. Show it as text, never as markup. */
  readonly message: string;
  /** A path or an https URL; to be checked again before it is made a link (see link.js). */
  readonly link: string | null;
  /** ISO 8601. */
  readonly created_at: string;
  /** ISO 8601, or null while unread. */
  readonly read_at: string | null;
}

export interface Preference {
  readonly event_type: string;
  readonly description: string;
  readonly enabled: boolean;
  /** Cannot be switched off. */
  readonly required: boolean;
}

/**
 * - `connecting`: the first attempts, or between two streams
 * - `live`: streaming
 * - `polling`: the stream cannot be had; asks every 30 s, and keeps trying
 * - `offline`: neither; keeps trying
 * - `signed-out`: nobody is signed in; `connect()` after a sign-in
 * - `closed`: `close()` was called
 */
export type Status = "connecting" | "live" | "polling" | "offline" | "signed-out" | "closed";

export interface Snapshot {
  readonly status: Status;
  /** Whether the list has been loaded. */
  readonly loaded: boolean;
  /** Whether this tab holds the stream for all tabs. */
  readonly leader: boolean;
  readonly userId: string | null;
  /** Newest first, without gaps, each id once. */
  readonly notifications: readonly Notification[];
  /** Of all unread notifications, those not in the list included. */
  readonly unreadCount: number;
  readonly preferences: readonly Preference[];
  /** Whether `loadOlder()` has more. */
  readonly hasMore: boolean;
}

export interface NotificationClientOptions {
  /** Where the service's API is; same origin. Default: "/api". */
  url?: string;
}

/** What a rejected promise of the client carries. */
export class NotificationError extends Error {
  constructor(
    status: number,
    problem?: { type?: string; title?: string; status?: number; detail?: string },
  );
  /** The HTTP status; 0 if there was no answer. */
  readonly status: number;
  /** The problem document (RFC 9457), if the service sent one. */
  readonly problem?: { type?: string; title?: string; status?: number; detail?: string };
}

export interface NotificationClientEventMap {
  /** A notification arrived (not one that was there when the page was opened). Once per page. */
  notification: CustomEvent<Notification>;
}

/**
 * The notifications of whoever is signed in, kept up to date.
 *
 * All tabs of a browser share one stream and one list: a tab that closes, freezes or crashes is
 * replaced by another, which goes on from the same cursor. Instances with the same `url` count as
 * tabs, so that several on a page cost no more.
 *
 * It reconnects by itself for ever: full-jitter backoff up to 30 s, the server's `closing` reasons
 * and delays honoured, a watchdog for lines that died in silence, polling where nothing streams.
 *
 * ```js
 * const client = new NotificationClient();
 * client.subscribe(() => draw(client.getSnapshot()));
 * ```
 */
export class NotificationClient extends EventTarget {
  constructor(options?: NotificationClientOptions);

  /**
   * Calls `listener` after each change. The first call connects.
   * @returns stops the calls; the connection stays until `close()`
   */
  subscribe: (listener: () => void) => () => void;

  /** The state; the same frozen object until something changes, as useSyncExternalStore wants it. */
  getSnapshot: () => Snapshot;

  /**
   * Marks one, several, or "all" up to the newest that is shown here. Shown at once, and taken back
   * if the server refuses.
   */
  markRead(which: number | readonly number[] | "all"): Promise<void>;

  /** Switches an event type on or off; as `markRead`, shown at once. */
  setPreference(eventType: string, enabled: boolean): Promise<void>;

  /** Adds the next page of older ones to the list. */
  loadOlder(): Promise<void>;

  /** Asks who is signed in, and connects, in all tabs; to be called after a sign-in. */
  connect(): void;

  /** Ends the session, and the stream of all tabs. */
  signOut(): Promise<void>;

  /** Lets go of everything. The instance cannot be used again. */
  close(): void;

  addEventListener<K extends keyof NotificationClientEventMap>(
    type: K,
    listener: (event: NotificationClientEventMap[K]) => void,
    options?: boolean | AddEventListenerOptions,
  ): void;
  addEventListener(
    type: string,
    listener: EventListenerOrEventListenerObject | null,
    options?: boolean | AddEventListenerOptions,
  ): void;
}
