/** `link` if following it is safe (a path, http or https), else null. */
export function safeLink(link: string | null | undefined): string | null;
