// Documentation and types: client.d.ts.
// The tab with the Web Lock leads: it alone streams, polls and loads, and tells the others what it
// heard. All keep the same list, so any can take over.

const PAGE = 50;
const FIRST_EVENT = 10_000; // ms; a proxy that buffers shows by silence
const SLOW = 30_000; // ms; longest backoff, and from poll to poll
const PATIENCE = 3; // failures until polling begins
// keep: rows; older ones can be loaded again
const NOTHING = { items: [], below: 0, more: false, keep: 500, userId: null, preferences: [] };

export class NotificationError extends Error {
  constructor(status, problem) {
    super(problem?.detail || `HTTP ${status}`);
    Object.assign(this, { status, problem });
  }
}

export class NotificationClient extends EventTarget {
  #url;
  #name;
  #state = NOTHING; // below: unread ones older than items
  #status = "connecting";
  #loaded = false;
  #cursor; // the last id in the order of the stream, not the highest
  #seen = new Set(); // ids announced here
  #listeners = new Set();
  #snapshot;
  #emitting = false;
  #timers = {};
  #channel;
  #leading = false;
  #waiting; // aborts the wait for the lock
  #release; // gives it back
  #source;
  #attempt = 0; // answers to an earlier attempt are void
  #failures = 0;
  #polling = false;
  #ready = false;
  #opened = false; // was live before
  #heartbeat = 15_000;
  #heard = 0;
  #etag = [];
  #loading;
  #log; // events that arrived while the list was fetched

  constructor({ url = "/api" } = {}) {
    super();
    this.#url = url;
    this.#name = `notifications-1:${url}`;
  }

  // ---- For pages

  subscribe = (listener) => {
    this.#listeners.add(listener);
    this.#start();
    return () => this.#listeners.delete(listener);
  };

  getSnapshot = () => {
    const { items, preferences, userId, more } = this.#state;
    return (this.#snapshot ??= Object.freeze({
      status: this.#status,
      loaded: this.#loaded,
      leader: this.#leading,
      userId,
      notifications: items,
      unreadCount: this.#unread(),
      preferences,
      hasMore: more,
    }));
  };

  async markRead(which) {
    const newest = this.#state.items[0]?.id;
    const body = which === "all" ? { up_to: newest } : { ids: [].concat(which) };
    if (!newest || body.ids?.length === 0) return;
    this.#submit("read", body);
    await this.#change("POST", "/notifications/read", body);
  }

  async setPreference(event_type, enabled) {
    this.#submit("preferences", { preferences: [{ event_type, enabled }] });
    await this.#change("PUT", `/preferences/${encodeURIComponent(event_type)}`, { enabled });
  }

  async loadOlder() {
    const before = this.#state.items.at(-1)?.id;
    if (!this.#state.more || !before) return;
    const page = [before, await this.#list(`&before=${before}`)];
    this.#older(page);
    this.#post("older", page);
  }

  connect() {
    this.#start();
    this.#hear("connect");
    this.#post("connect");
  }

  async signOut() {
    await this.#fetch("/session", "DELETE", {});
    this.connect();
  }

  close() {
    this.#stepDown();
    this.#clear(...Object.keys(this.#timers));
    if (this.#channel) this.#pageEvents("removeEventListener");
    this.#channel?.close();
    this.#channel = null;
    this.#setStatus("closed");
  }

  // ---- What is known

  #unread() {
    return this.#state.items.reduce((n, item) => n + !item.read_at, this.#state.below);
  }

  #set(change) {
    this.#state = { ...this.#state, ...change };
    this.#changed();
  }

  #setStatus(status) {
    if (status === "connecting" && this.#polling) return;
    this.#status = status;
    this.#changed();
    if (this.#leading) this.#post("status", status);
  }

  #changed() {
    this.#snapshot = null;
    if (this.#emitting) return;
    this.#emitting = true;
    const emit = () => {
      this.#emitting = false;
      for (const listener of this.#listeners) listener();
    };
    // A long replay is not drawn row by row.
    if (this.#ready) queueMicrotask(emit);
    else setTimeout(emit, 16);
  }

  // Applies an event; false if the list has to be looked at.
  #apply(name, data) {
    const { items, below, more, keep, preferences } = this.#state;
    const lowest = items.at(-1)?.id;
    if (name === "notification") {
      const at = items.findIndex((item) => item.id <= data.id);
      // In `below` already, or a late commit.
      if (at < 0 && more) return false;
      if (items[at]?.id !== data.id) {
        const next = [...items];
        next.splice(at < 0 ? next.length : at, 0, { read_at: null, ...data });
        const cut = next.length > keep + PAGE ? next.splice(keep) : [];
        this.#set({ items: next, below: below + count(cut), more: more || cut.length > 0 });
      }
      if (!this.#seen.has(data.id)) {
        this.#seen.add(data.id);
        this.dispatchEvent(new CustomEvent("notification", { detail: data }));
      }
    } else if (name === "read") {
      const { ids, up_to } = data;
      const chosen = new Set(ids);
      const known = items.filter((item) => chosen.has(item.id)).length === chosen.size;
      const read_at = new Date().toISOString();
      this.#set({
        items: items.map((item) =>
          !item.read_at && (chosen.has(item.id) || item.id <= up_to) ? { ...item, read_at } : item,
        ),
        below: up_to >= lowest ? 0 : below,
      });
      // A row that committed beside "all up to" may be unread.
      return known && !up_to;
    } else {
      const changed = new Map(data.preferences.map((one) => [one.event_type, one]));
      this.#set({
        preferences: preferences.map((one) => ({ ...one, ...changed.get(one.event_type) })),
      });
    }
    return true;
  }

  #older([before, { notifications, next_before, unread_count }]) {
    const { items, below, keep } = this.#state;
    if (items.at(-1)?.id !== before) return; // another tab was first
    this.#set({
      items: [...items, ...notifications],
      keep: Math.max(keep, items.length + notifications.length),
      below: Math.max(0, below - count(notifications)),
      more: next_before !== null,
    });
    if (unread_count !== this.#unread()) this.#doubt();
  }

  #load() {
    return (this.#loading ??= this.#loadNow().finally(() => {
      this.#loading = this.#log = null;
    }));
  }

  async #loadNow() {
    const attempt = this.#attempt;
    const log = (this.#log = []);
    const [{ user_id: userId }, { preferences }, first] = await Promise.all([
      this.#fetch("/session"),
      this.#fetch("/preferences"),
      this.#list(""),
    ]);
    const same = this.#loaded && userId === this.#state.userId;
    const lowest = same ? this.#state.items.at(-1)?.id : Infinity;
    const items = first.notifications;
    let next = first.next_before;
    let pages = 1;
    for (; next && items.at(-1).id > lowest && items.length < this.#state.keep; pages++) {
      const page = await this.#list(`&before=${next}`);
      items.push(...page.notifications);
      next = page.next_before;
    }
    if (attempt !== this.#attempt) return;
    if (!same) {
      this.#cursor = null;
      this.#known(items);
    }
    // The list down from a row has all that a replay after that row leaves out.
    this.#cursor ??= items[0]?.id;
    this.#loaded = true;
    this.#log = null;
    const below = Math.max(0, first.unread_count - count(items));
    this.#set({ items, preferences, userId, below, more: next !== null });
    // What arrived meanwhile may be missing in the answer.
    for (const event of log) this.#apply(...event);
    if (pages > 1 && log.length) this.#doubt();
    this.#tell();
  }

  #known(items) {
    this.#seen = new Set(items.map((item) => item.id));
  }

  // Something may have been missed: look soon.
  #doubt(ms = 300 + Math.random() * 1200) {
    if (!this.#leading) return this.#post("doubt");
    this.#etag = [];
    this.#later("load", ms, () =>
      this.#load().catch(({ status }) => {
        if (status === 401) this.#signedOut();
        else this.#doubt(Math.random() * SLOW);
      }),
    );
  }

  // ---- Tabs

  #start() {
    if (this.#channel !== undefined) return;
    this.#channel = new BroadcastChannel(this.#name);
    this.#channel.onmessage = ({ data: [kind, data] }) => this.#hear(kind, data);
    this.#pageEvents("addEventListener");
    this.#elect();
  }

  #pageEvents(does) {
    for (const type of "pagehide pageshow online freeze resume visibilitychange".split(" ")) {
      window[does](type, this.#onPage, true);
    }
  }

  #onPage = ({ type, persisted }) => {
    if (type === "freeze" || type === "pagehide") this.#stepDown();
    else if (type === "resume" || persisted) this.#elect();
    else if (type === "pageshow" || document.hidden) return;
    else if (!this.#leading) this.#watch(0);
    // Its line may be dead without knowing.
    else if (
      type === "online" ||
      this.#status === "signed-out" ||
      (this.#source && Date.now() - this.#heard > this.#heartbeat * 1.2)
    ) {
      this.#open();
    } else this.#poke();
  };

  #post(kind, data) {
    this.#channel?.postMessage([kind, data]);
  }

  #tell() {
    this.#post("state", [this.#state, this.#status, this.#loaded, this.#cursor]);
  }

  #hear(kind, data) {
    if (kind === "older") return this.#older(data);
    if (this.#leading) {
      if (kind === "hello") {
        // A new tab may come from a sign-in page; a hidden one's timers be late.
        if (data && this.#status === "signed-out") this.#open();
        else this.#poke();
        this.#tell();
      } else if (kind === "submit") this.#publish(...data);
      else if (kind === "doubt") this.#doubt();
      else if (kind === "connect") {
        this.#loaded = false;
        this.#open();
      } else if (kind === "alive" && !navigator.locks) this.#stepDown();
      return;
    }
    if (kind === "bye") return this.#watch(Math.random() * 300);
    if (kind === "state") {
      const [state, status, loaded, cursor] = data;
      if (!this.#loaded || state.userId !== this.#state.userId) this.#known(state.items);
      this.#loaded = loaded;
      this.#cursor = cursor;
      this.#set(state);
      this.#setStatus(status);
    } else if (kind === "event") {
      this.#cursor = data[2] || this.#cursor;
      this.#apply(...data);
    } else if (kind === "status") this.#setStatus(data);
    else if (kind !== "alive") return;
    this.#watch();
  }

  // Takes the lead from a tab that fell silent.
  #watch(ms = document.hidden || this.#status === "live" ? 2.5 * this.#heartbeat + SLOW : 5000) {
    this.#later("watch", ms, () => {
      this.#post("hello");
      const patience = (navigator.locks ? 1500 : 200) + document.hidden * 2000;
      this.#later("watch", patience + Math.random() * 500, () => this.#elect(true));
    });
  }

  #elect(steal = false) {
    this.#post("hello", true);
    this.#watch(steal || navigator.locks ? undefined : 0);
    if (!navigator.locks) {
      // No secure context: who hears no leader becomes one.
      if (steal) this.#lead();
      return;
    }
    this.#waiting?.abort();
    const { signal } = (this.#waiting = new AbortController());
    navigator.locks
      .request(this.#name, steal ? { steal } : { signal }, () => {
        if (signal.aborted) return;
        this.#lead();
        return new Promise((release) => {
          this.#release = release;
        });
      })
      .catch(() => {
        if (signal.aborted) return;
        this.#stepDown(); // taken by another tab
        this.#elect();
      });
  }

  #lead() {
    this.#clear("watch");
    this.#leading = true;
    this.#failures = 0;
    this.#post("alive");
    this.#open();
  }

  #stepDown() {
    this.#waiting?.abort();
    if (!this.#leading) return;
    this.#stop();
    this.#leading = false;
    this.#changed();
    this.#post("bye");
    this.#release?.();
    if (!navigator.locks) this.#watch();
  }

  // ---- The stream

  // Opens the stream anew, at the cursor.
  async #open() {
    if (!this.#leading) return;
    this.#shut();
    const attempt = this.#attempt;
    const current = () => attempt === this.#attempt;
    this.#setStatus("connecting");
    try {
      await this.#loading?.catch(() => {});
      if (!this.#loaded && current()) await this.#load();
    } catch (error) {
      if (current()) this.#failed(error);
    }
    if (!this.#loaded || !current()) return;

    const query = this.#cursor ? `?last_event_id=${this.#cursor}` : "";
    const source = (this.#source = new EventSource(`${this.#url}/stream${query}`, {
      withCredentials: true,
    }));
    this.#expect();
    const handlers = {
      reset: () => {
        this.#cursor = null;
        this.#doubt(0);
      },
      ready: ({ unread_count, heartbeat_seconds }) => {
        this.#ready = true;
        this.#heartbeat = heartbeat_seconds * 1000 || this.#heartbeat;
        this.#polling = false;
        this.#clear("poll");
        this.#setStatus("live");
        if (unread_count !== this.#unread()) this.#doubt(0);
        // What came and was read meanwhile changes no count.
        else if (this.#opened) this.#doubt();
        this.#opened = true;
      },
      ping: () => {
        this.#failures = 0; // not at `ready`: failing right after it is no success
        this.#post("alive");
      },
      closing: ({ reason, retry_ms }) => {
        this.#shut();
        if (reason === "session_ended") {
          this.#loaded = false; // asks for the session
          if (this.#failures++) this.#failed();
          else this.#open();
        } else if (reason === "superseded") {
          // By a page without this client, which keeps its stream.
          if (navigator.locks) this.#poll(20 * SLOW);
          else this.#stepDown();
        } else {
          this.#setStatus("connecting");
          this.#later("open", retry_ms, () => this.#open());
          if (/overload|limit|unavailable/.test(reason) && ++this.#failures >= PATIENCE) {
            this.#poll(retry_ms);
          }
        }
      },
    };
    for (const name of ["notification", "read", "preferences", ...Object.keys(handlers)]) {
      source.addEventListener(name, ({ data, lastEventId }) => {
        if (!current()) return;
        const handle = handlers[name] ?? ((it) => this.#publish(name, it, lastEventId));
        handle(JSON.parse(data));
        if (current()) this.#expect();
      });
    }
    source.onerror = async () => {
      if (!current()) return;
      const refused = source.readyState === 2;
      this.#shut();
      // Signed out, or the server away? EventSource does not say.
      const error = refused && (await this.#fetch("/session").catch((reason) => reason));
      if (this.#attempt === attempt + 1) this.#failed(error);
    };
  }

  #shut() {
    this.#attempt++;
    this.#ready = false;
    this.#source?.close();
    this.#source = null;
    this.#clear("open", "silence");
  }

  #stop() {
    this.#shut();
    this.#polling = false;
    this.#clear("poll", "load");
  }

  #expect() {
    this.#heard = Date.now();
    this.#later("silence", this.#ready ? 2.5 * this.#heartbeat : FIRST_EVENT, () => {
      this.#shut();
      this.#failed();
    });
  }

  #failed(error) {
    if (!this.#leading) return;
    if (error?.status === 401) return this.#signedOut();
    const ms = Math.random() * Math.min(SLOW, 1000 * 2 ** this.#failures++);
    this.#setStatus("connecting");
    if (this.#failures >= PATIENCE) this.#poll(ms);
    else this.#later("open", ms, () => this.#open());
  }

  #signedOut() {
    this.#stop();
    this.#loaded = this.#opened = false;
    this.#cursor = null;
    this.#set(NOTHING);
    this.#setStatus("signed-out");
    this.#tell();
  }

  // Polls; the stream is tried again in `ms`.
  #poll(ms) {
    this.#later("open", ms, () => this.#open());
    if (this.#polling) return;
    this.#polling = true;
    this.#pollNow();
  }

  async #pollNow(after = this.#cursor ?? "") {
    let again = SLOW * (0.75 + Math.random() / 2);
    let next;
    try {
      const path = `/notifications/unread?after=${after}`;
      const page = this.#loaded ? await this.#fetch(path) : undefined;
      if (!this.#polling) return;
      if (page) {
        for (const row of page.notifications) this.#publish("notification", row, row.id);
        if (page.reset) this.#cursor = null;
        if (page.more) [again, next] = [0, page.next];
        else if (page.reset || page.unread_count !== this.#unread()) this.#doubt(0);
      }
      this.#setStatus(page === undefined ? "offline" : "polling");
    } catch ({ status }) {
      if (!this.#polling) return;
      if (status === 401) return this.#signedOut();
      this.#setStatus("offline");
    }
    this.#later("poll", again, () => this.#pollNow(next));
  }

  // Applies an event in all tabs.
  #publish(name, data, id) {
    this.#cursor = id || this.#cursor;
    this.#post("event", [name, data, id]);
    this.#log?.push([name, data]);
    if (!this.#apply(name, data) && this.#ready) this.#doubt();
  }

  // Shows a change before the server knows.
  #submit(name, data) {
    if (this.#leading) return this.#publish(name, data);
    this.#apply(name, data);
    this.#post("submit", [name, data]);
  }

  async #change(method, path, body) {
    try {
      const { unread_count } = await this.#fetch(path, method, body);
      if (unread_count >= 0 && unread_count !== this.#unread()) this.#doubt();
    } catch (error) {
      this.#doubt(); // takes back what was shown
      throw error;
    }
  }

  #list(before) {
    return this.#fetch(`/notifications?limit=${PAGE}${before}`);
  }

  async #fetch(path, method = "GET", body) {
    const headers = body ? { "Content-Type": "application/json" } : {};
    if (path === this.#etag[0]) headers["If-None-Match"] = this.#etag[1];
    let status = 0;
    let answer;
    try {
      const response = await fetch(this.#url + path, {
        method,
        headers,
        body: body && JSON.stringify(body),
        cache: "no-store",
        credentials: "include",
        keepalive: !!body, // the page may be left
        signal: AbortSignal.timeout(15_000),
      });
      ({ status } = response);
      if (status === 304) return null;
      if (status === 204) return {};
      answer = await response.json();
      const etag = response.headers.get("ETag");
      if (response.ok) {
        if (etag && path.includes("/unread")) this.#etag = [path, etag];
        return answer;
      }
    } catch {
      // No answer, or a proxy's error page.
    }
    throw new NotificationError(status, answer);
  }

  // setTimeout stands still while the machine sleeps.
  #later(key, ms = 1000, run) {
    const due = Date.now() + ms;
    const step = () => {
      this.#clear(key);
      const left = due - Date.now();
      // The clock may be set back.
      if (left <= 0 || left > ms) return run();
      this.#timers[key] = { step, id: setTimeout(step, Math.min(left, 5000)) };
    };
    this.#clear(key);
    this.#timers[key] = { step, id: setTimeout(step, Math.min(ms, 5000)) };
  }

  #clear(...keys) {
    for (const key of keys) {
      clearTimeout(this.#timers[key]?.id);
      delete this.#timers[key];
    }
  }

  #poke() {
    for (const { step } of Object.values(this.#timers)) step();
  }
}

function count(items) {
  return items.filter((item) => !item.read_at).length;
}
