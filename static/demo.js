import "./inbox.js";
import { Popups, showCount } from "./popups.js";
import { sharedClient } from "./shared.js";

const USERS = ["alice", "bob", "carol"];
const STATUS = {
  connecting: "Connecting…",
  live: "Live",
  polling: "Polling",
  offline: "Server away",
  "signed-out": "Signed out",
  closed: "Closed",
};
const LOG_ROWS = 8;

const $ = (id) => document.getElementById(id);
const client = sharedClient();
const popups = new Popups(client, { icon: "/static/icon.svg" });
const inPane = new URLSearchParams(location.search).has("pane");
const latencies = [];

for (const id of ["bell", "inbox"]) $(id).popups = popups;
if (inPane) document.documentElement.classList.add("only");
else showCount(client);

// ---- Signing in

for (const user of USERS) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = user;
  button.addEventListener("click", () => signIn(user));
  $("people").append(button);
  const option = document.createElement("option");
  option.value = user;
  $("users").append(option);
}

$("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  signIn(new FormData(event.target).get("user_id").trim());
});

$("sign-out").addEventListener("click", () => client.signOut().catch(() => client.connect()));

async function signIn(user_id) {
  const error = $("sign-in").querySelector(".error");
  error.textContent = "";
  try {
    await post("/demo/session", { user_id });
    client.connect();
  } catch (problem) {
    error.textContent = problem.message;
  }
}

async function post(path, body) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  const answer = await response.json().catch(() => ({}));
  if (response.ok) return answer;
  throw new Error(
    response.status === 404
      ? "The demo sign-in is off on this server."
      : answer.detail || answer.title || `HTTP ${response.status}`,
  );
}

// ---- Sending

$("publish").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.target;
  const note = form.querySelector(".note");
  const fields = Object.fromEntries(new FormData(form));
  try {
    const { id, outcome } = await post("/demo/publish", { ...fields, link: fields.link || null });
    note.textContent = id
      ? `Row ${id} inserted for ${fields.user_id}.`
      : outcome === "rate_limited"
        ? `${fields.user_id} has had too many this minute: no row.`
        : `${fields.user_id} has switched ${fields.event_type} off: no row.`;
  } catch (problem) {
    note.textContent = problem.message;
  }
});

// ---- Showing

client.addEventListener("notification", ({ detail }) => {
  if (document.hidden) return; // nothing is painted now
  requestAnimationFrame(() => {
    // A task queued within a frame runs after its paint.
    setTimeout(() => arrived(detail, Date.now() - Date.parse(detail.created_at)), 0);
  });
});

function arrived({ id, event_type, created_at }, ms) {
  // What was replayed is old: its time says how long this page was away.
  const fresh = ms >= 0 && ms < 5000;
  if (fresh) latencies.push(ms);
  if (latencies.length > 100) latencies.shift();
  const row = document.createElement("tr");
  const time = new Date(created_at).toLocaleTimeString();
  for (const text of [id, event_type, time, fresh ? `${ms} ms` : "replayed"]) {
    const cell = document.createElement("td");
    cell.textContent = text;
    row.append(cell);
  }
  $("log").prepend(row);
  while ($("log").rows.length > LOG_ROWS) $("log").lastElementChild.remove();
  $("log-empty").hidden = true;
  if (!latencies.length) return;
  const sorted = latencies.toSorted((a, b) => a - b);
  const median = sorted[sorted.length >> 1];
  $("fact-latency").textContent = `${latencies.at(-1)} ms`;
  $("fact-median").textContent = `${median} ms of ${sorted.length}`;
}

let shownUser = null;

function draw() {
  const { status, userId, leader, unreadCount, loaded } = client.getSnapshot();
  const signedOut = status === "signed-out";
  $("state").textContent = $("fact-status").textContent = STATUS[status];
  $("state").dataset.status = status;
  $("who").textContent = userId ?? (signedOut ? "Sign in" : "…");
  $("sign-in").hidden = !signedOut;
  $("signed-in").hidden = !loaded;
  $("sign-out").hidden = !loaded;
  $("bell").hidden = !loaded;
  $("fact-role").textContent = leader ? "streams" : "is fed by one";
  $("fact-unread").textContent = unreadCount;
  if (userId === shownUser) return;
  shownUser = userId;
  latencies.length = 0;
  $("log").replaceChildren();
  $("log-empty").hidden = false;
  $("fact-latency").textContent = $("fact-median").textContent = "–";
  if (userId) $("publish").elements.user_id.value = USERS.find((user) => user !== userId);
}

client.subscribe(draw);
draw();

// ---- The second user

if (inPane) parent.postMessage("pane", location.origin);
// A frame with the attribute `credentialless` has a cookie jar of its own.
else if ("credentialless" in HTMLIFrameElement.prototype) frameBeside();
else linkBeside();

function frameBeside() {
  const frame = document.createElement("iframe");
  frame.credentialless = true;
  frame.title = "A second user";
  frame.src = "/?pane";
  $("panes").classList.add("two");
  $("panes").append(frame);
  // Where this page may not be framed, none of it comes.
  const gone = setTimeout(() => {
    frame.remove();
    $("panes").classList.remove("two");
    linkBeside();
  }, 5000);
  window.addEventListener("message", ({ data, source }) => {
    if (data === "pane" && source === frame.contentWindow) clearTimeout(gone);
  });
}

/** The other name of this machine has other cookies. */
function linkBeside() {
  const names = { localhost: "127.0.0.1", "127.0.0.1": "localhost" };
  const url = new URL(location.href);
  if (!names[url.hostname]) return;
  url.hostname = names[url.hostname];
  $("beside").href = url.href;
  $("beside").hidden = false;
}
