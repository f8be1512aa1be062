// <notification-inbox>: bell, badge and list. Documentation and types: inbox.d.ts.

import { inboxStyle } from "./inbox.css.js";
import { safeLink } from "./link.js";
import { sharedClient } from "./shared.js";

export const STRINGS = Object.freeze({
  title: "Notifications",
  bell: (unread) => (unread ? `Notifications, ${unread} unread` : "Notifications"),
  all: "All",
  unread: "Unread",
  view: "Show",
  type: "Type",
  anyType: "All types",
  markAll: "Mark all read",
  markOne: (message) => `Mark as read: ${message}`,
  settings: "Settings",
  close: "Close",
  preferences: "Tell me about",
  required: "Always on",
  popups: "Pop-ups on this device",
  popupsDenied: "Blocked in the browser’s settings",
  older: "Load older",
  loading: "Loading…",
  empty: "Nothing here yet. New notifications appear by themselves.",
  emptyUnread: "All caught up.",
  emptyFilter: "Nothing of this type in what is loaded.",
  signedOut: "Sign in to see your notifications.",
  failed: "That did not work. Please try again.",
  arrived: (messages) =>
    messages.length === 1
      ? `New notification: ${messages[0]}`
      : `${messages.length} new notifications`,
  status: Object.freeze({
    connecting: "Connecting…",
    live: "Live",
    polling: "Checking every 30 seconds; the live connection is blocked",
    offline: "The server cannot be reached; trying again",
    "signed-out": "Signed out",
    closed: "Closed",
  }),
  types: Object.freeze({
    new_message: "Message",
    status_change: "Status change",
    system_alert: "System alert",
  }),
});

const ICONS = {
  bell: "M12 22a2.5 2.5 0 0 0 2.45-2h-4.9A2.5 2.5 0 0 0 12 22Zm7-6V11a7 7 0 0 0-5.5-6.84V3.5a1.5 1.5 0 0 0-3 0v.66A7 7 0 0 0 5 11v5l-1.7 1.7a.75.75 0 0 0 .53 1.3h16.34a.75.75 0 0 0 .53-1.3L19 16Z",
  check: "M9.55 17.6 4.4 12.45l1.4-1.4 3.75 3.75 8.65-8.65 1.4 1.4L9.55 17.6Z",
  gear: "M3 7h10.17a3 3 0 0 0 5.66 0H21V5h-2.17a3 3 0 0 0-5.66 0H3v2Zm13-2a1 1 0 1 1 0 2 1 1 0 0 1 0-2ZM3 13h2.17a3 3 0 0 0 5.66 0H21v-2H10.83a3 3 0 0 0-5.66 0H3v2Zm5-2a1 1 0 1 1 0 2 1 1 0 0 1 0-2Zm-5 8h10.17a3 3 0 0 0 5.66 0H21v-2h-2.17a3 3 0 0 0-5.66 0H3v2Zm13-2a1 1 0 1 1 0 2 1 1 0 0 1 0-2Z",
  cross: "m6.4 19-1.4-1.4 5.6-5.6L5 6.4 6.4 5l5.6 5.6L17.6 5 19 6.4 13.4 12l5.6 5.6-1.4 1.4-5.6-5.6L6.4 19Z",
};

const MOMENTS = [
  [60, "second", 1],
  [3600, "minute", 60],
  [86_400, "hour", 3600],
  [7 * 86_400, "day", 86_400],
];

// Also where there is no DOM (a server that renders the page), so that the import does no harm.
const Base = globalThis.HTMLElement ?? class {};

export class NotificationInbox extends Base {
  static observedAttributes = ["inline", "open", "url"];

  #client = null;
  #popups = null;
  #strings = STRINGS;
  #view = "all";
  #type = "";
  #settings = false;
  #busy = false;
  #error = "";
  #nodes = null;
  #items = new Map(); // id → { row, node, … }
  #arrivals = [];
  #stop = [];
  #statusTimer = 0;
  #shownStatus = null;

  /** The NotificationClient; without one, the page's shared one. */
  get client() {
    return (this.#client ??= sharedClient(this.getAttribute("url") ?? undefined));
  }

  set client(client) {
    this.#disconnect();
    this.#client = client ?? null;
    if (this.isConnected) this.#connect();
  }

  /** A Popups (popups.js); with one, the settings have a switch for it. */
  get popups() {
    return this.#popups;
  }

  set popups(popups) {
    this.#popups = popups ?? null;
    this.#draw();
  }

  /** Texts to replace; what is left out stays English. */
  get strings() {
    return this.#strings;
  }

  set strings(strings) {
    this.#strings = {
      ...STRINGS,
      ...strings,
      status: { ...STRINGS.status, ...strings?.status },
      types: { ...STRINGS.types, ...strings?.types },
    };
    if (!this.#nodes) return;
    this.#items.clear();
    this.shadowRoot.replaceChildren();
    this.#nodes = null;
    this.#build();
    this.#draw();
  }

  get open() {
    return this.hasAttribute("open");
  }

  set open(open) {
    this.toggleAttribute("open", Boolean(open));
  }

  get inline() {
    return this.hasAttribute("inline");
  }

  set inline(inline) {
    this.toggleAttribute("inline", Boolean(inline));
  }

  connectedCallback() {
    // Properties that were set before the element was defined hide the accessors.
    for (const name of ["client", "popups", "strings", "open", "inline"]) {
      if (!Object.hasOwn(this, name)) continue;
      const value = this[name];
      delete this[name];
      this[name] = value;
    }
    if (!this.#nodes) this.#build();
    this.#connect();
  }

  disconnectedCallback() {
    this.#disconnect();
  }

  attributeChangedCallback(name) {
    if (name === "url" && this.#stop.length) this.client = null;
    else this.#draw();
  }

  #connect() {
    if (this.#stop.length) return;
    const { client } = this;
    const arrived = ({ detail }) => this.#arrived(detail);
    const outside = (event) => {
      if (this.open && !this.inline && !event.composedPath().includes(this)) this.open = false;
    };
    const tick = setInterval(() => document.hidden || this.#drawTimes(), 20_000);
    client.addEventListener("notification", arrived);
    document.addEventListener("pointerdown", outside);
    this.#stop = [
      client.subscribe(() => this.#draw()),
      () => client.removeEventListener("notification", arrived),
      () => document.removeEventListener("pointerdown", outside),
      () => clearInterval(tick),
      () => clearTimeout(this.#statusTimer),
    ];
    this.#draw();
  }

  #disconnect() {
    for (const stop of this.#stop.splice(0)) stop();
  }

  // ---- Building

  #build() {
    const root = this.shadowRoot ?? this.attachShadow({ mode: "open" });
    root.adoptedStyleSheets = [inboxStyle()];
    const s = this.#strings;
    const n = (this.#nodes = {});

    n.badge = make("span", { class: "badge", part: "badge", "aria-hidden": "true" });
    n.bell = make(
      "button",
      { class: "bell", part: "bell", type: "button", "aria-haspopup": "dialog" },
      icon("bell"),
      n.badge,
    );
    n.bell.onclick = () => this.#toggle(!this.open);

    n.title = make("h2", { id: "title", tabindex: "-1" }, s.title);
    n.all = make("button", { class: "all", type: "button" }, s.markAll);
    n.all.onclick = () => {
      n.title.focus();
      this.#do(this.client.markRead("all"));
    };
    n.gear = iconButton("gear", s.settings);
    n.gear.setAttribute("aria-controls", "settings");
    n.gear.onclick = () => {
      this.#settings = !this.#settings;
      this.#draw();
    };
    n.close = iconButton("cross", s.close);
    n.close.onclick = () => this.#toggle(false);

    n.views = {};
    for (const view of ["all", "unread"]) {
      n.views[view] = make("button", { type: "button" }, s[view]);
      n.views[view].onclick = () => {
        this.#view = view;
        this.#draw();
      };
    }
    n.type = make("select", { "aria-label": s.type });
    n.type.onchange = () => {
      this.#type = n.type.value;
      this.#draw();
    };
    n.bar = make(
      "div",
      { class: "bar" },
      make("div", { class: "views", role: "group", "aria-label": s.view }, ...Object.values(n.views)),
      n.type,
    );

    n.preferences = make("fieldset", {}, make("legend", {}, s.preferences));
    n.popupsSwitch = make("input", { class: "switch", type: "checkbox", role: "switch" });
    n.popupsSwitch.onchange = () => this.#do(this.#switchPopups(n.popupsSwitch.checked));
    n.popupsNote = make("small", {});
    n.popups = make("label", {}, make("span", {}, s.popups, n.popupsNote), n.popupsSwitch);
    n.settings = make("div", { id: "settings", class: "settings" }, n.preferences, n.popups);
    n.switches = new Map();

    n.alert = make("p", { class: "alert", role: "alert" });
    n.list = make("ul", { "aria-labelledby": "title", part: "list" });
    n.blank = make("div", { class: "blank" }, icon("bell"), make("p", {}));
    n.older = make("button", { class: "older", type: "button" }, s.older);
    n.older.onclick = () => this.#loadOlder();
    n.body = make("div", { class: "body", part: "body" }, n.list, n.blank, n.older);
    n.foot = make("p", { class: "foot", part: "status", role: "status" });
    n.head = make("div", { class: "head" }, n.title, n.all, n.gear, n.close);
    n.panel = make(
      "section",
      { class: "panel", part: "panel", id: "panel", "aria-labelledby": "title" },
      n.head,
      n.bar,
      n.settings,
      n.alert,
      n.body,
      n.foot,
    );
    n.panel.onkeydown = (event) => {
      if (event.key !== "Escape" || this.inline) return;
      event.stopPropagation();
      this.#toggle(false);
    };
    n.live = make("div", { class: "hush", "aria-live": "polite" });
    root.append(n.bell, n.panel, n.live);
  }

  #toggle(open) {
    this.open = open;
    (open ? this.#nodes.title : this.#nodes.bell).focus();
  }

  // ---- Doing

  async #do(promise) {
    this.#error = "";
    try {
      await promise;
    } catch {
      this.#error = this.#strings.failed;
    }
    this.#draw();
  }

  async #loadOlder() {
    this.#busy = true;
    await this.#do(this.client.loadOlder().finally(() => (this.#busy = false)));
  }

  async #switchPopups(on) {
    if (on) await this.#popups.enable();
    else this.#popups.disable();
  }

  #openLink(event, row) {
    // A page with a router of its own takes the click over with preventDefault().
    const go = this.dispatchEvent(
      new CustomEvent("notification-open", {
        detail: row,
        bubbles: true,
        composed: true,
        cancelable: true,
      }),
    );
    if (!go) event.preventDefault();
    if (!row.read_at) this.#do(this.client.markRead(row.id));
  }

  #arrived(row) {
    const entry = this.#items.get(row.id);
    entry?.node.classList.add("new");
    if (document.hidden) return;
    if (!this.#arrivals.length) {
      // Several at once are one sentence.
      setTimeout(() => {
        this.#nodes.live.textContent = this.#strings.arrived(this.#arrivals.splice(0));
      }, 500);
    }
    this.#arrivals.push(row.message);
  }

  // ---- Drawing

  #draw() {
    const n = this.#nodes;
    if (!n || !this.#stop.length) return;
    const s = this.#strings;
    const snapshot = this.client.getSnapshot();
    const { notifications, unreadCount, status, loaded, hasMore } = snapshot;
    const signedOut = status === "signed-out";

    n.bell.hidden = this.inline;
    n.bell.setAttribute("aria-label", s.bell(unreadCount));
    n.bell.setAttribute("aria-expanded", String(this.open));
    n.badge.hidden = !unreadCount;
    n.badge.textContent = unreadCount > 99 ? "99+" : String(unreadCount);
    n.panel.hidden = !(this.inline || this.open);
    if (!this.inline) n.panel.setAttribute("role", "dialog");
    else n.panel.removeAttribute("role");
    n.close.hidden = this.inline;
    n.all.hidden = !loaded || !unreadCount;
    n.bar.hidden = n.gear.hidden = !loaded;
    n.gear.setAttribute("aria-expanded", String(this.#settings));
    n.settings.hidden = !this.#settings || !loaded;
    n.alert.hidden = !this.#error;
    if (n.alert.textContent !== this.#error) n.alert.textContent = this.#error;

    for (const [view, node] of Object.entries(n.views)) {
      node.setAttribute("aria-pressed", String(view === this.#view));
    }
    n.views.unread.textContent = unreadCount ? `${s.unread} (${unreadCount})` : s.unread;
    this.#drawPreferences(snapshot.preferences);
    this.#drawStatus(status);

    const rows = notifications.filter(
      (row) =>
        (this.#view === "all" || !row.read_at) && (!this.#type || row.event_type === this.#type),
    );
    this.#drawList(rows);

    n.older.hidden = !hasMore;
    n.older.disabled = this.#busy;
    n.older.textContent = this.#busy ? s.loading : s.older;
    n.blank.hidden = rows.length > 0;
    n.blank.lastChild.textContent = signedOut
      ? s.signedOut
      : !loaded
        ? status === "offline"
          ? s.status.offline
          : s.loading
        : this.#type
          ? s.emptyFilter
          : this.#view === "unread"
            ? s.emptyUnread
            : s.empty;
  }

  #drawStatus(status) {
    const show = () => {
      this.#shownStatus = status;
      this.#nodes.foot.dataset.status = status;
      this.#nodes.foot.textContent = this.#strings.status[status];
    };
    clearTimeout(this.#statusTimer);
    // A stream that ends and comes back at once is nobody's business.
    if (status === "connecting" && this.#shownStatus) this.#statusTimer = setTimeout(show, 1500);
    else if (this.#nodes.foot.textContent !== this.#strings.status[status]) show();
  }

  #drawPreferences(preferences) {
    const n = this.#nodes;
    const names = preferences.map((one) => one.event_type);
    if (names.join() !== [...n.switches.keys()].join()) {
      n.switches.clear();
      n.preferences.replaceChildren(n.preferences.firstChild);
      const any = make("option", { value: "" }, this.#strings.anyType);
      n.type.replaceChildren(any);
      for (const { event_type, description } of preferences) {
        const node = make("input", { class: "switch", type: "checkbox", role: "switch" });
        node.onchange = () => this.#do(this.client.setPreference(event_type, node.checked));
        const note = make("small", {}, description ?? "");
        const label = make("span", {}, this.#typeName(event_type), note);
        n.preferences.append(make("label", {}, label, node));
        n.switches.set(event_type, { node, note, description: description ?? "" });
        n.type.append(make("option", { value: event_type }, this.#typeName(event_type)));
      }
      if (!names.includes(this.#type)) this.#type = "";
      n.type.value = this.#type;
    }
    for (const { event_type, enabled, required } of preferences) {
      const { node, note, description } = n.switches.get(event_type);
      node.checked = enabled || required;
      node.disabled = required;
      note.textContent = required ? this.#strings.required : description;
    }
    const popups = this.#popups;
    n.popups.hidden = !popups || popups.state === "unsupported";
    if (popups) {
      n.popupsSwitch.checked = popups.enabled;
      n.popupsSwitch.disabled = popups.state === "denied";
      n.popupsNote.textContent = popups.state === "denied" ? this.#strings.popupsDenied : "";
    }
  }

  #drawList(rows) {
    const { list, title } = this.#nodes;
    const focused = this.shadowRoot.activeElement;
    const lost = focused?.closest?.(".item");
    const position = lost ? [...list.children].indexOf(lost) : -1;

    const wanted = new Set(rows.map((row) => row.id));
    for (const [id, { node }] of this.#items) {
      if (wanted.has(id)) continue;
      node.remove();
      this.#items.delete(id);
    }
    let next = list.firstElementChild;
    for (const row of rows) {
      let entry = this.#items.get(row.id);
      if (!entry) this.#items.set(row.id, (entry = this.#item(row)));
      else if (entry.row !== row) this.#drawItem(entry, row);
      // Moves only what is out of place: a moved node loses the focus.
      if (entry.node === next) next = next.nextElementSibling;
      else list.insertBefore(entry.node, next);
    }
    list.hidden = !rows.length;
    // The button that was pressed has gone with the item, or is hidden as it is read now.
    if (position >= 0 && (focused.hidden || this.shadowRoot.activeElement !== focused)) {
      const items = [...list.children];
      const near = [...items.slice(position), ...items.slice(0, position).reverse()];
      const button = near.map((item) => item.querySelector(".icon:not([hidden])")).find(Boolean);
      (button ?? title).focus();
    }
  }

  #item(row) {
    const message = make("p", { class: "message" });
    const type = make("span", {}, this.#typeName(row.event_type));
    const time = make("time", { datetime: row.created_at });
    const state = make("span", { class: "hush" });
    const button = iconButton("check", "");
    button.onclick = () => this.#do(this.client.markRead(row.id));
    const link = safeLink(row.link);
    if (link) {
      const anchor = make("a", { href: link }, row.message);
      if (new URL(link, location.href).origin !== location.origin) anchor.rel = "noopener noreferrer";
      anchor.onclick = (event) => this.#openLink(event, this.#items.get(row.id).row);
      message.append(anchor);
    } else message.textContent = row.message;
    const node = make(
      "li",
      { class: "item", part: "item" },
      make("span", { class: "dot", "aria-hidden": "true" }),
      make("div", { class: "text" }, message, make("p", { class: "meta" }, type, " · ", time, state)),
      button,
    );
    node.dataset.id = row.id;
    const entry = { row: null, node, time, state, button };
    this.#drawItem(entry, row);
    return entry;
  }

  #drawItem(entry, row) {
    entry.row = row;
    entry.node.classList.toggle("unread", !row.read_at);
    entry.state.textContent = row.read_at ? "" : `, ${this.#strings.unread}`;
    const label = this.#strings.markOne(row.message.slice(0, 80));
    entry.button.setAttribute("aria-label", label);
    entry.button.title = label;
    entry.button.hidden = Boolean(row.read_at);
    this.#drawTime(entry);
  }

  #drawTimes() {
    for (const entry of this.#items.values()) this.#drawTime(entry);
  }

  #drawTime({ row, time }) {
    const at = new Date(row.created_at);
    const seconds = Math.max(0, (Date.now() - at) / 1000);
    const language = this.closest("[lang]")?.lang || undefined;
    const moment = MOMENTS.find(([limit]) => seconds < limit);
    time.textContent = moment
      ? new Intl.RelativeTimeFormat(language, { numeric: "auto", style: "short" }).format(
          seconds < 10 ? 0 : -Math.floor(seconds / moment[2]),
          moment[1],
        )
      : at.toLocaleDateString(language, { dateStyle: "medium" });
    time.title = at.toLocaleString(language);
  }

  #typeName(type) {
    return this.#strings.types[type] ?? type.replaceAll("_", " ");
  }
}

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

function iconButton(name, label) {
  return make("button", { class: "icon", type: "button", "aria-label": label, title: label }, icon(name));
}

globalThis.customElements?.get("notification-inbox") ??
  globalThis.customElements?.define("notification-inbox", NotificationInbox);
