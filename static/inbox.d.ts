import type { Notification, NotificationClient, Status } from "./client.js";
import type { Popups } from "./popups.js";

export interface InboxStrings {
  title: string;
  bell: (unread: number) => string;
  all: string;
  unread: string;
  view: string;
  type: string;
  anyType: string;
  markAll: string;
  markOne: (message: string) => string;
  settings: string;
  close: string;
  preferences: string;
  required: string;
  popups: string;
  popupsDenied: string;
  older: string;
  loading: string;
  empty: string;
  emptyUnread: string;
  emptyFilter: string;
  signedOut: string;
  failed: string;
  arrived: (messages: readonly string[]) => string;
  status: Record<Status, string>;
  /** Names of event types. */
  types: Record<string, string>;
}

/** The English texts. */
export const STRINGS: Readonly<InboxStrings>;

/**
 * `<notification-inbox>`: a bell with a badge that opens the list, or, with the attribute `inline`,
 * the list alone.
 *
 * Attributes: `inline`, `open`, `url` (of the API, default "/api"), `theme` ("light" or "dark";
 * default: what the system says). Dates follow the nearest `lang`, the layout the nearest `dir`.
 *
 * Custom properties: `--inbox-surface`, `--inbox-raised`, `--inbox-text`, `--inbox-muted`,
 * `--inbox-border`, `--inbox-control`, `--inbox-accent`, `--inbox-on-accent`, `--inbox-unread`,
 * `--inbox-badge`, `--inbox-on-badge`, `--inbox-good`, `--inbox-warn`, `--inbox-bad`,
 * `--inbox-shadow`, `--inbox-radius`, `--inbox-font`, `--inbox-width`, `--inbox-height`.
 *
 * Parts: `bell`, `badge`, `panel`, `body`, `list`, `item`, `status`.
 *
 * Fires `notification-open` (bubbles, cancelable) when a link is clicked; `preventDefault()` leaves
 * following it to the page.
 */
export class NotificationInbox extends HTMLElement {
  /** Default: the page's shared client for `url`. */
  get client(): NotificationClient;
  set client(client: NotificationClient | null);
  /** With one, the settings have a switch for pop-ups. */
  get popups(): Popups | null;
  set popups(popups: Popups | null);
  /** Texts to replace. */
  get strings(): InboxStrings;
  set strings(strings: Partial<Omit<InboxStrings, "status" | "types">> & {
    status?: Partial<Record<Status, string>>;
    types?: Record<string, string>;
  } | null);
  open: boolean;
  inline: boolean;
}

declare global {
  interface HTMLElementTagNameMap {
    "notification-inbox": NotificationInbox;
  }
  interface HTMLElementEventMap {
    "notification-open": CustomEvent<Notification>;
  }
}
