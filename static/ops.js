// The operators' page. Asks for totals every two seconds and draws what lies between two answers.
// Text goes in as textContent only: users' ids are whatever their application makes them.

const POLL_MS = 2000;
const AUDIT_MS = 6000;
const POINTS = 150; // five minutes
const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 170;
const LEFT = 52;
const BOTTOM = 18;
const TOP = 8;

const byId = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function drawn(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const seconds = (value) => {
  if (value === null || value === undefined) return "–";
  if (value >= 1) return `${number.format(value)} s`;
  return `${number.format(value * 1000)} ms`;
};
const plain = (value) => (value === null || value === undefined ? "–" : number.format(value));
const perSecond = (value) => (value === null ? "–" : `${number.format(value)}/s`);

// Charts

/** The smallest round number that is not below the value. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 3, 4, 5, 6, 8, 10].map((step) => step * power).find((step) => step >= value * 0.9999);
}

class Chart {
  /**
   * lines: [name, class, value of a point][]; least: what the axis reaches at least;
   * band: which points are shaded, and what that is called.
   */
  constructor(title, lines, format, least, band = null) {
    this.title = title;
    this.lines = lines;
    this.format = format;
    this.least = least;
    this.band = band;
    this.figure = element("figure", null, "card chart");
    this.caption = element("figcaption", title);
    this.keys = lines.map(([, className]) => element("span", "", `key ${className}`));
    this.caption.append(...this.keys);
    this.bandKey = element("span", "", "key shaded");
    if (band) this.caption.append(this.bandKey);
    this.svg = drawn("svg", { role: "img" });
    this.figure.append(this.caption, this.svg);
  }

  draw(points) {
    const values = this.lines.map(([, , value]) => points.map(value));
    const known = values.flat().filter((value) => value !== null);
    const top = roundUp(Math.max(this.least, ...known));
    // In CSS pixels, so that the text has its size on every screen.
    const WIDTH = Math.max(240, Math.round(this.svg.clientWidth || 560));
    this.svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    const x = (index) => LEFT + ((POINTS - points.length + index) / (POINTS - 1)) * (WIDTH - LEFT - 6);
    const y = (value) => TOP + (1 - value / top) * (HEIGHT - TOP - BOTTOM);
    const parts = [];
    if (this.band) {
      points.forEach((point, index) => {
        if (index && this.band.holds(point)) {
          const from = x(index - 1);
          parts.push(drawn("rect", { class: "band", x: from, y: TOP, width: x(index) - from, height: HEIGHT - TOP - BOTTOM }));
        }
      });
      this.bandKey.textContent = this.band.says(points.at(-1));
    }
    for (const share of [0, 0.5, 1]) {
      const at = y(top * share);
      parts.push(drawn("line", { class: "grid", x1: LEFT, x2: WIDTH - 6, y1: at, y2: at }));
      parts.push(drawn("text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, this.format(top * share)));
    }
    const span = ((POINTS - 1) * POLL_MS) / 60000;
    parts.push(drawn("text", { x: LEFT, y: HEIGHT - 3 }, `${number.format(span)} min ago`));
    parts.push(drawn("text", { x: WIDTH - 6, y: HEIGHT - 3, "text-anchor": "end" }, "now"));
    values.forEach((series, position) => {
      // A gap where there is nothing to tell, not a line across it.
      let run = [];
      const flush = () => {
        if (run.length) parts.push(drawn("polyline", { class: this.lines[position][1], points: run.join(" ") }));
        run = [];
      };
      series.forEach((value, index) => {
        if (value === null) flush();
        else run.push(`${x(index).toFixed(1)},${y(value).toFixed(1)}`);
        if (value !== null && run.length === 1 && (series[index + 1] ?? null) === null) {
          run.push(`${(x(index) + 0.1).toFixed(1)},${y(value).toFixed(1)}`); // a point of its own
        }
      });
      flush();
      const [name] = this.lines[position];
      this.keys[position].textContent = `${name} ${this.format(series.at(-1) ?? null)}`;
    });
    this.svg.replaceChildren(...parts);
    const said = [...this.keys, this.bandKey].filter((key) => key.textContent).map((key) => key.textContent).join(", ");
    this.svg.setAttribute("aria-label", `${this.title}: now ${said}`);
  }
}

const charts = [
  new Chart("Streams", [
    ["live", "one", (point) => point.live],
    ["replaying", "two", (point) => point.replaying],
    ["lagging", "three", (point) => point.lagging],
  ], plain, 4),
  new Chart("Deliveries", [
    ["live", "one", (point) => point.deliveries],
    ["replayed", "two", (point) => point.replayed],
  ], perSecond, 4),
  new Chart("Created → written", [
    ["p50", "one", (point) => point.p50],
    ["p99", "two", (point) => point.p99],
  ], seconds, 0.01),
  new Chart("Feed lag", [
    ["last sweep", "one", (point) => point.swept],
    ["last heard", "two", (point) => point.heard],
  ], seconds, 4, {
    holds: (point) => point.polling,
    says: (point) => (point.polling ? "mode: polling" : "mode: notified"),
  }),
];

/** The quantile of what came between two answers, within its bucket by proportion. */
function quantile(share, before, after) {
  const counts = after.buckets.map((bucket, index) => bucket.count - (before.buckets[index]?.count ?? 0));
  const all = counts.at(-1) ?? 0;
  if (all <= 0) return null;
  const wanted = share * all;
  const index = counts.findIndex((count) => count >= wanted);
  const above = after.buckets[index].seconds;
  const below = index ? after.buckets[index - 1].seconds : 0;
  if (above === null) return below; // more than the last bound
  const less = index ? counts[index - 1] : 0;
  return below + ((above - below) * (wanted - less)) / Math.max(1, counts[index] - less);
}

const points = [];
let last = null;

function add(state) {
  const at = Date.parse(state.at);
  const { live = 0, replaying = 0, lagging = 0 } = state.streams;
  const point = {
    live, replaying, lagging,
    swept: state.feed.swept_seconds_ago, heard: state.feed.heard_seconds_ago,
    polling: state.feed.polling,
    deliveries: null, replayed: null, p50: null, p99: null,
  };
  // After a restart the totals start anew.
  if (last && state.deliveries >= last.deliveries && at > last.when) {
    const passed = (at - last.when) / 1000;
    point.deliveries = (state.deliveries - last.deliveries) / passed;
    point.replayed = Math.max(0, state.replayed - last.replayed) / passed;
    point.p50 = quantile(0.5, last.latency, state.latency);
    point.p99 = quantile(0.99, last.latency, state.latency);
  }
  last = { ...state, when: at };
  points.push(point);
  if (points.length > POINTS) points.shift();
  return point;
}

function showTiles(state, point) {
  const total = point.live + point.replaying + point.lagging;
  const tiles = [
    ["Open streams", plain(total)],
    ["Deliveries", perSecond(point.deliveries)],
    ["p99 latency", seconds(point.p99)],
    ["Feed", state.feed.connected ? (state.feed.polling ? "polling" : "notified") : "disconnected", !state.feed.connected],
    ["Database pool", `${state.pool.in_use} of ${state.pool.size}`, state.pool.waiting > 0],
    ["Waiting for it", plain(state.pool.waiting), state.pool.waiting > 0],
    ["Reconnects", plain(state.feed.reconnects)],
    ["Workers", plain(state.workers)],
  ];
  byId("tiles").replaceChildren(...tiles.map(([name, value, bad]) => {
    const tile = element("div", null, bad ? "bad" : "");
    tile.append(element("dt", name), element("dd", value));
    return tile;
  }));
}

function showClosed(state) {
  const rows = [
    ...Object.entries(state.closed).map(([reason, count]) => [reason, count]),
    ...Object.entries(state.turned_away).map(([reason, count]) => [`turned away: ${reason}`, count]),
  ].filter(([, count]) => count > 0).sort((one, other) => other[1] - one[1]).slice(0, 8);
  if (!rows.length) {
    byId("closed").replaceChildren(element("p", "None has ended.", "none"));
    return;
  }
  const bars = element("div", null, "bars");
  for (const [reason, count] of rows) {
    const meter = element("meter");
    meter.max = rows[0][1];
    meter.value = count;
    meter.setAttribute("aria-label", reason);
    bars.append(element("span", reason), meter, element("span", plain(count)));
  }
  byId("closed").replaceChildren(bars);
}

function showHealth(text, className) {
  const health = byId("health");
  // Written only when it changes: it is read aloud.
  if (health.textContent !== text) health.textContent = text;
  health.className = `health ${className}`;
}

// Audit

function showAudit(lines) {
  byId("audit").replaceChildren(...lines.map((line) => {
    const row = element("tr");
    const detail = Object.keys(line.detail).length ? JSON.stringify(line.detail) : "";
    const id = element("td");
    if (line.notification_id !== null) {
      const button = element("button", String(line.notification_id));
      button.type = "button";
      button.dataset.explain = line.notification_id;
      button.setAttribute("aria-label", `Explain notification ${line.notification_id}`);
      id.append(button);
    }
    row.append(
      element("td", line.at.slice(11, 23)), element("td", line.actor), element("td", line.action),
      element("td", line.user_id), element("td", line.event_type), id,
      element("td", line.outcome), element("td", detail),
    );
    return row;
  }));
}

// Explain

function step(className, title, text) {
  const item = element("li", null, className);
  item.append(element("b", title), element("span", text));
  return item;
}

const WHY_NOT = {
  suppressed: "Suppressed",
  rate_limited: "Refused: the user had too many within a minute",
  deleted: "Deleted",
  not_committed: "Not there",
  not_given_out: "Never written",
};
const WHY_NOT_MORE = {
  deleted: "Every row that is there came later: retention has deleted it, or its transaction was rolled back.",
  not_committed: "Its transaction was rolled back or is still open, or the row was deleted by hand.",
  not_given_out: "No INSERT has been given this id yet.",
};

function way(told) {
  const steps = [];
  const { notification, refused, here } = told;
  if (refused) {
    const by = refused.preference === "user" ? `${refused.user_id} has switched ${refused.event_type} off`
      : refused.preference === "default" ? `${refused.event_type} is off by default, and ${refused.user_id} has not switched it on`
        : `for ${refused.user_id}, ${refused.event_type}`;
    steps.push(step("stopped", WHY_NOT[told.state] ?? told.state, `${by}. Sent by ${refused.actor} at ${refused.at}.`));
    return steps;
  }
  if (notification) {
    steps.push(step("done", "Committed", `${notification.event_type} for ${notification.user_id}, written by ${notification.actor} at ${notification.created_at}.`));
  } else {
    steps.push(step("stopped", WHY_NOT[told.state] ?? told.state, WHY_NOT_MORE[told.state] ?? ""));
  }
  const process = `process ${here.process}`;
  if (here.announced_at) {
    steps.push(step("done", "Matched", `${here.written + here.waiting} streams of the user in ${process}, at ${here.announced_at}.`));
    steps.push(step(here.written ? "done" : "", "Written live", `To ${here.written} streams. ${here.waiting} were replaying or slow and were to find it in the table.`));
  } else if (notification && !here.replayed) {
    steps.push(step("", "Not seen lately", `No stream of the user was open in ${process} when it came, or it is thousands of notifications ago, or another process had it.`));
  }
  if (here.announced_at || here.replayed) {
    steps.push(step(here.replayed ? "done" : "", "Replayed", `To ${here.replayed} streams in ${process}, which found it in the table.`));
  }
  if (notification) {
    steps.push(notification.read_at ? step("done", "Read", `At ${notification.read_at}.`)
      : step("", "Not read", `Every new stream of the user replays it until it is. Open in ${process} now: ${here.streams}.`));
  }
  return steps;
}

async function explain(id) {
  byId("id").value = id;
  try {
    byId("way").replaceChildren(...way(await ask(`/ops/api/notifications/${encodeURIComponent(id)}`)));
  } catch (error) {
    byId("way").replaceChildren(step("stopped", "No answer", error.message));
  }
}

// Asking

class NotSignedIn extends Error {}

async function ask(path, options = {}) {
  const response = await fetch(path, { cache: "no-store", credentials: "same-origin", ...options });
  if (response.ok) return response.status === 204 ? null : response.json();
  const problem = await response.json().catch(() => ({}));
  const text = problem.detail || problem.title || `The server answers ${response.status}.`;
  if (response.status === 401) throw new NotSignedIn(text);
  throw new Error(text);
}

let paused = false;
let timer = null;
let auditDue = 0;

async function poll() {
  clearTimeout(timer);
  // A page that nobody sees asks for nothing.
  if (!document.hidden && !paused) {
    try {
      const state = await ask("/ops/api/state");
      const point = add(state);
      open(true);
      showTiles(state, point);
      showClosed(state);
      for (const chart of charts) chart.draw(points);
      showHealth(state.ready ? `serving, version ${state.version}` : "not ready", state.ready ? "good" : "bad");
      if (Date.now() >= auditDue) {
        auditDue = Date.now() + AUDIT_MS;
        // Not under somebody's fingers.
        if (!byId("audit").contains(document.activeElement)) {
          showAudit((await ask("/ops/api/audit?limit=50")).lines);
        }
      }
    } catch (error) {
      if (error instanceof NotSignedIn) {
        open(false);
        return;
      }
      showHealth(error instanceof TypeError ? "the server does not answer" : error.message, "bad");
    }
  }
  timer = setTimeout(poll, POLL_MS);
}

function open(signedIn) {
  const changed = byId("board").hidden === signedIn || byId("gate").hidden !== signedIn;
  byId("board").hidden = !signedIn;
  byId("gate").hidden = signedIn;
  byId("sign-out").hidden = !signedIn;
  byId("pause").hidden = !signedIn;
  if (!signedIn) showHealth("", "");
  if (changed && !signedIn) byId("key").focus();
}

byId("charts").append(...charts.map((chart) => chart.figure));

byId("sign-in").addEventListener("submit", async (event) => {
  event.preventDefault();
  byId("refused").textContent = "";
  const body = JSON.stringify({ key: byId("key").value });
  try {
    await ask("/ops/api/session", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    byId("key").value = "";
    auditDue = 0;
    await poll();
  } catch (error) {
    byId("refused").textContent = error.message;
    byId("key").select();
  }
});

byId("sign-out").addEventListener("click", async () => {
  clearTimeout(timer);
  await ask("/ops/api/session", { method: "DELETE" }).catch(() => {});
  points.length = 0;
  last = null;
  byId("audit").replaceChildren();
  byId("way").replaceChildren();
  open(false);
});

byId("pause").addEventListener("click", () => {
  paused = !paused;
  byId("pause").setAttribute("aria-pressed", String(paused));
  byId("pause").textContent = paused ? "Resume" : "Pause";
  if (!paused) poll();
});

byId("explain").addEventListener("submit", (event) => {
  event.preventDefault();
  explain(byId("id").value.trim());
});

byId("audit").addEventListener("click", (event) => {
  const button = event.target.closest("button[data-explain]");
  if (button) {
    explain(button.dataset.explain);
    byId("explain").scrollIntoView({ block: "nearest" });
  }
});

addEventListener("resize", () => {
  if (points.length) for (const chart of charts) chart.draw(points);
});

document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !byId("board").hidden) poll();
});

poll();
