import { useState } from "react";
import { Inbox, useNotifications } from "notifications/react.js";

const STRINGS = { title: "What’s new" };

export function App() {
  const { status, userId, loaded } = useNotifications();
  const [page, setPage] = useState("/");

  if (status === "signed-out") return <SignIn />;
  if (!loaded) return <p className="quiet">Connecting…</p>;
  return (
    <>
      <header>
        <strong>Shop</strong>
        <span className="quiet">{userId}</span>
        <Inbox
          strings={STRINGS}
          onOpen={(row) => {
            setPage(row.link); // as a router would
            return false;
          }}
        />
      </header>
      <main>
        <p className="quiet">Page: {page}</p>
        <Latest />
      </main>
    </>
  );
}

function Latest() {
  const { notifications, unreadCount, status, leader, markRead, signOut } = useNotifications();
  return (
    <section>
      <h1>{unreadCount} unread</h1>
      <ul>
        {notifications.slice(0, 5).map((row) => (
          <li key={row.id}>
            {row.message} {row.read_at ? "" : <button onClick={() => markRead(row.id)}>Read</button>}
          </li>
        ))}
      </ul>
      <p className="quiet">
        {status}, {leader ? "this tab holds the stream" : "another tab holds the stream"}
      </p>
      <button onClick={() => markRead("all")}>Mark all read</button>{" "}
      <button onClick={signOut}>Sign out</button>
    </section>
  );
}

function SignIn() {
  const { connect } = useNotifications();
  async function signIn(data) {
    await fetch("/demo/session", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ user_id: data.get("user") }),
    });
    connect();
  }
  return (
    <form action={signIn}>
      <label>
        User <input name="user" defaultValue="alice" required />
      </label>{" "}
      <button>Sign in</button>
    </form>
  );
}
