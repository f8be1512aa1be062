import type { NotificationClient } from "./client.js";

/** The page's client for this API; made at the first call, and again after `close()`. */
export function sharedClient(url?: string): NotificationClient;
