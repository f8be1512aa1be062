// Node's own HTTP server with better-sse.
//
// As in better-sse's "Getting Started" and "Channels" guides: a session per stream, registered in a
// channel; the channel broadcasts. One channel for everybody and one for each user. With a database
// it LISTENs as the guide of node-postgres shows ("pg.Client", event "notification").
//
//     node server.js PORT
//
//     GET  /all, /own/NAME     a stream
//     POST /all, /own/NAME     the body goes to those streams as the data of one event
//
// BENCH_DSN and BENCH_CHANNEL name the database and the channel to listen to: the payloads are those
// of sse_server's trigger, so that all contenders are told by the same NOTIFY.

import { createServer } from "node:http";
import { createChannel, createSession } from "better-sse";
import pg from "pg";

const channels = new Map();
let lastId = 0;

function publish(topic, data) {
  channels.get(topic)?.broadcast(data, "notification", { eventId: String(++lastId) });
}

async function subscribe(topic, request, response) {
  const session = await createSession(request, response);
  let channel = channels.get(topic);
  if (channel === undefined) {
    channel = createChannel();
    channels.set(topic, channel);
    channel.on("session-deregistered", () => {
      if (channel.sessionCount === 0) channels.delete(topic);
    });
  }
  channel.register(session);
}

const server = createServer((request, response) => {
  const topic = request.url;
  if (request.method !== "POST") {
    subscribe(topic, request, response).catch(() => response.destroy());
    return;
  }
  const parts = [];
  request.on("data", (part) => parts.push(part));
  request.on("end", () => {
    publish(topic, JSON.parse(Buffer.concat(parts)));
    response.writeHead(204).end();
  });
});

async function listen(dsn, channel) {
  const url = new URL(dsn.replace("@/", "@localhost/"));
  const client = new pg.Client({
    host: url.searchParams.get("host") ?? url.hostname,
    port: Number(url.searchParams.get("port") ?? url.port),
    user: url.username,
    database: url.pathname.slice(1),
  });
  await client.connect();
  client.on("notification", ({ payload }) => {
    const told = JSON.parse(payload);
    if (told.t !== "notification") return;
    for (const [id, user, created] of told.r) {
      const data = {
        id,
        created_at: new Date(created).toISOString(),
        event_type: told.e,
        message: told.m,
        link: told.l,
      };
      const topic = user === "everybody" ? "/all" : `/own/${user}`;
      channels.get(topic)?.broadcast(data, "notification", { eventId: String(id) });
    }
  });
  await client.query(`LISTEN ${pg.escapeIdentifier(channel)}`);
}

if (process.env.BENCH_DSN) await listen(process.env.BENCH_DSN, process.env.BENCH_CHANNEL);
server.listen({ port: Number(process.argv[2]), host: "127.0.0.1", backlog: 4096 });
