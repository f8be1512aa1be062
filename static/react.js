// React bindings; React 19 is a peer. Documentation and types: react.d.ts.

import { createElement, useEffect, useMemo, useRef, useSyncExternalStore } from "react";

import "./inbox.js";
import { sharedClient } from "./shared.js";

/** The notifications of whoever is signed in, and what can be done with them. */
export function useNotifications({ client, url } = {}) {
  // A page's components share one client, so that mounting one costs nothing.
  const used = client ?? sharedClient(url);
  const snapshot = useSyncExternalStore(used.subscribe, used.getSnapshot, used.getSnapshot);
  const actions = useMemo(() => bind(used), [used]);
  return { ...snapshot, ...actions };
}

function bind(client) {
  return {
    client,
    markRead: (which) => client.markRead(which),
    setPreference: (type, enabled) => client.setPreference(type, enabled),
    loadOlder: () => client.loadOlder(),
    connect: () => client.connect(),
    signOut: () => client.signOut(),
  };
}

/** `<notification-inbox>` with properties; `onOpen(row)` may return false to keep a link. */
export function Inbox({ client, url, popups, strings, onOpen, ...rest }) {
  const element = useRef(null);
  useEffect(() => {
    const { current } = element;
    if (!onOpen) return undefined;
    const opened = (event) => {
      if (onOpen(event.detail) === false) event.preventDefault();
    };
    current.addEventListener("notification-open", opened);
    return () => current.removeEventListener("notification-open", opened);
  }, [onOpen]);
  return createElement("notification-inbox", {
    ...rest,
    ref: element,
    client: client ?? sharedClient(url),
    popups,
    strings,
  });
}
