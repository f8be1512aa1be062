// `link` if following it is safe (a path, http or https), else null.
export function safeLink(link) {
  try {
    return link && /^https?:$/.test(new URL(link, location.href).protocol) ? link : null;
  } catch {
    return null;
  }
}
