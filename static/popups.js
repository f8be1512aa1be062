// Pop-ups of the browser, and the count in its title and icon. Documentation and types: popups.d.ts.

import { safeLink } from "./link.js";

const VISIBLE = "notifications-visible"; // a lock that every visible tab shares
const CHOICE = "notifications-popups";
const GATHER = 300; // ms; what comes together, after a sleep say, is one pop-up
const SINGLY = 3; // pop-ups at once at most

export class Popups {
  #client;
  #options;
  #waiting = [];
  #hide = null;

  constructor(client, options = {}) {
    this.#client = client;
    this.#options = {
      title: (row) => row.event_type.replaceAll("_", " "),
      several: (count) => `${count} new notifications`,
      worker: new URL("./sw.js", import.meta.url).href,
      open: (link) => location.assign(link),
      ...options,
    };
    client.addEventListener("notification", this.#arrived);
    document.addEventListener("visibilitychange", this.#visibility);
    navigator.serviceWorker?.addEventListener("message", this.#clicked);
    navigator.serviceWorker?.startMessages?.();
    this.#visibility();
  }

  get state() {
    if (!("Notification" in window) || !navigator.locks) return "unsupported";
    return Notification.permission;
  }

  get enabled() {
    return this.state === "granted" && localStorage.getItem(CHOICE) === "on";
  }

  /** Asks for the permission; browsers allow that in a click's handler only. */
  async enable() {
    if (this.state === "unsupported") return false;
    if ((await Notification.requestPermission()) === "granted") localStorage.setItem(CHOICE, "on");
    return this.enabled;
  }

  disable() {
    localStorage.removeItem(CHOICE);
  }

  close() {
    this.#client.removeEventListener("notification", this.#arrived);
    document.removeEventListener("visibilitychange", this.#visibility);
    navigator.serviceWorker?.removeEventListener("message", this.#clicked);
    this.#hide?.();
  }

  #visibility = () => {
    this.#hide?.();
    this.#hide = null;
    if (document.hidden || !navigator.locks) return;
    // Released by the browser if this tab crashes or freezes for good.
    const shown = new Promise((hide) => (this.#hide = hide));
    navigator.locks.request(VISIBLE, { mode: "shared" }, () => shown);
  };

  #arrived = ({ detail }) => {
    // Each tab hears of each notification; the one with the stream shows it.
    if (!this.enabled || !this.#client.getSnapshot().leader) return;
    if (!this.#waiting.length) setTimeout(() => this.#show(), GATHER);
    this.#waiting.push(detail);
  };

  async #show() {
    const rows = this.#waiting.splice(0);
    const { held } = await navigator.locks.query();
    if (held.some((lock) => lock.name === VISIBLE)) return;
    // Read on another device while it waited here.
    const known = this.#client.getSnapshot().notifications;
    const unread = rows.filter((row) => !known.find((it) => it.id === row.id)?.read_at);
    const { title, several } = this.#options;
    if (unread.length > SINGLY) {
      await this.#popUp(several(unread.length), { tag: "several", data: {} });
      return;
    }
    for (const { id, message, link, event_type } of unread) {
      const data = { id, link: safeLink(link) };
      await this.#popUp(title({ id, message, link, event_type }), {
        body: message,
        tag: String(id),
        data,
      });
    }
  }

  async #popUp(title, options) {
    const all = { icon: this.#options.icon, ...options };
    try {
      const popup = new Notification(title, all);
      popup.onclick = () => {
        popup.close();
        window.focus();
        this.#follow(options.data);
      };
    } catch {
      // Chrome on Android has them from a service worker only.
      await navigator.serviceWorker.register(this.#options.worker);
      const registration = await this.#active();
      await registration.showNotification(title, all);
    }
  }

  async #active() {
    const registration = await navigator.serviceWorker.getRegistration(this.#options.worker);
    const worker = registration.active ?? registration.waiting ?? registration.installing;
    while (worker.state !== "activated") {
      await new Promise((done) => worker.addEventListener("statechange", done, { once: true }));
      if (worker.state === "redundant") throw new Error("The service worker was not installed");
    }
    return registration;
  }

  #clicked = ({ data }) => {
    if (data?.type === "notification-click") this.#follow(data.notification);
  };

  #follow({ id, link }) {
    if (id) this.#client.markRead(id).catch(() => {});
    if (link) this.#options.open(link);
  }
}

/** Shows the number of unread ones in the title and, where there is one, on the app's icon. */
export function showCount(client) {
  const show = () => {
    const { unreadCount } = client.getSnapshot();
    const title = document.title.replace(/^\(\d+\) /, "");
    const next = unreadCount ? `(${unreadCount}) ${title}` : title;
    if (next !== document.title) document.title = next;
    const done = unreadCount ? navigator.setAppBadge?.(unreadCount) : navigator.clearAppBadge?.();
    done?.catch(() => {});
  };
  const stop = client.subscribe(show);
  show();
  return () => {
    stop();
    document.title = document.title.replace(/^\(\d+\) /, "");
    navigator.clearAppBadge?.().catch(() => {});
  };
}
