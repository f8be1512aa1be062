// Shows nothing by itself: pages use its registration where `new Notification()` is not allowed.

self.addEventListener("notificationclick", (event) => {
  event.notification.close();
  event.waitUntil(focus(event.notification.data ?? {}));
});

async function focus(notification) {
  const pages = await self.clients.matchAll({ type: "window", includeUncontrolled: true });
  const page = pages.find((one) => one.visibilityState === "visible") ?? pages[0];
  if (!page) return self.clients.openWindow(notification.link ?? "/");
  await page.focus().catch(() => {});
  page.postMessage({ type: "notification-click", notification });
}
