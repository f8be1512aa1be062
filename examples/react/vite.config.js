import react from "@vitejs/plugin-react";
import { fileURLToPath } from "node:url";
import { defineConfig } from "vite";

const server = process.env.SSE_SERVER ?? "http://127.0.0.1:8080";
const path = (relative) => fileURLToPath(new URL(relative, import.meta.url));

// The page and the service are one origin, as behind a proxy in production. The Host header stays
// the page's, so that the service sees that its callers are of its own origin.
const proxy = Object.fromEntries(
  ["/api", "/demo"].map((prefix) => [prefix, { target: server, changeOrigin: false }]),
);

export default defineConfig({
  plugins: [react()],
  resolve: {
    alias: { notifications: path("../../static") },
    // The client's files are outside this folder, and find their React in it.
    dedupe: ["react", "react-dom"],
  },
  server: { proxy, fs: { allow: [path("."), path("../../static")] } },
  preview: { proxy },
});
