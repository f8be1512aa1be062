import type { HTMLAttributes, ReactElement } from "react";
import type { Notification, NotificationClient, Snapshot } from "./client.js";
import type { NotificationInbox } from "./inbox.js";
import type { Popups } from "./popups.js";

export interface NotificationsOptions {
  /** Default: the page's shared client for `url`. */
  client?: NotificationClient;
  /** Where the service's API is; default: "/api". */
  url?: string;
}

export interface Notifications extends Snapshot {
  readonly client: NotificationClient;
  readonly markRead: NotificationClient["markRead"];
  readonly setPreference: NotificationClient["setPreference"];
  readonly loadOlder: NotificationClient["loadOlder"];
  readonly connect: NotificationClient["connect"];
  readonly signOut: NotificationClient["signOut"];
}

/**
 * The notifications of whoever is signed in, and what can be done with them. All components of a
 * page share one client, all tabs one stream. The functions stay the same from render to render.
 */
export function useNotifications(options?: NotificationsOptions): Notifications;

export interface InboxProps
  extends NotificationsOptions,
    Omit<HTMLAttributes<NotificationInbox>, "children"> {
  inline?: boolean;
  open?: boolean;
  theme?: "light" | "dark";
  popups?: Popups;
  strings?: NotificationInbox["strings"] | Partial<NotificationInbox["strings"]>;
  /** A link was clicked; return false to follow it by a router of your own. */
  onOpen?: (row: Notification) => boolean | void;
}

/** `<notification-inbox>` as a React component. */
export function Inbox(props: InboxProps): ReactElement;
