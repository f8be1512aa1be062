import type { Notification, NotificationClient } from "./client.js";

export interface PopupsOptions {
  /** The pop-up's first line; the message is its text. Default: the event type. */
  title?: (row: Pick<Notification, "id" | "event_type" | "message" | "link">) => string;
  /** What stands for more than three that come at once. */
  several?: (count: number) => string;
  /** Address of an image. */
  icon?: string;
  /** Address of sw.js, which is needed where `new Notification()` is not allowed. */
  worker?: string;
  /** Follows a checked link; default: `location.assign`. */
  open?: (link: string) => void;
}

/**
 * Shows what arrives as a pop-up of the browser: once for all tabs, and only while none of them is
 * visible. A click brings the tab to the front, marks the notification read and opens its link.
 */
export class Popups {
  constructor(client: NotificationClient, options?: PopupsOptions);

  /** "unsupported", or the browser's permission. */
  readonly state: "unsupported" | NotificationPermission;

  /** Permitted, and switched on by the user of this browser. */
  readonly enabled: boolean;

  /**
   * Asks for the permission and switches them on; call it in a click's handler.
   * @returns whether they are on now
   */
  enable(): Promise<boolean>;

  /** Switches them off in this browser. */
  disable(): void;

  close(): void;
}

/**
 * Shows the number of unread notifications in the title, as "(3) …", and on the icon of an
 * installed app.
 * @returns stops it
 */
export function showCount(client: NotificationClient): () => void;
