import { NotificationClient } from "./client.js";

const clients = new Map();

// One client per API and page, for all components that were given none.
export function sharedClient(url = "/api") {
  let client = clients.get(url);
  if (!client || client.getSnapshot().status === "closed") {
    client = new NotificationClient({ url });
    clients.set(url, client);
  }
  return client;
}
