// The inbox's style sheet. A page's policy may forbid inline styles; a constructed sheet is none.

const LIGHT = `
  --_surface: var(--inbox-surface, #ffffff);
  --_raised: var(--inbox-raised, #f4f6f9);
  --_text: var(--inbox-text, #1a2230);
  --_muted: var(--inbox-muted, #586273);
  --_border: var(--inbox-border, #d9dee6);
  --_control: var(--inbox-control, #79838f);
  --_accent: var(--inbox-accent, #1d4fd7);
  --_on-accent: var(--inbox-on-accent, #ffffff);
  --_unread: var(--inbox-unread, #eef3ff);
  --_badge: var(--inbox-badge, #c62828);
  --_on-badge: var(--inbox-on-badge, #ffffff);
  --_good: var(--inbox-good, #1a7f4b);
  --_warn: var(--inbox-warn, #9a5b00);
  --_bad: var(--inbox-bad, #b42318);
  --_shadow: var(--inbox-shadow, 0 12px 32px rgb(20 30 50 / 18%), 0 2px 6px rgb(20 30 50 / 10%));
`;

const DARK = `
  --_surface: var(--inbox-surface, #161b23);
  --_raised: var(--inbox-raised, #1f2630);
  --_text: var(--inbox-text, #e7ecf3);
  --_muted: var(--inbox-muted, #a3afbe);
  --_border: var(--inbox-border, #303947);
  --_control: var(--inbox-control, #7d8998);
  --_accent: var(--inbox-accent, #8ab4ff);
  --_on-accent: var(--inbox-on-accent, #0b1524);
  --_unread: var(--inbox-unread, #1b2637);
  --_badge: var(--inbox-badge, #ff8a80);
  --_on-badge: var(--inbox-on-badge, #2a0606);
  --_good: var(--inbox-good, #5fd39a);
  --_warn: var(--inbox-warn, #f0b45a);
  --_bad: var(--inbox-bad, #ff9a8f);
  --_shadow: var(--inbox-shadow, 0 12px 32px rgb(0 0 0 / 55%));
`;

const CSS = `
:host {
  ${LIGHT}
  --_radius: var(--inbox-radius, 12px);
  display: inline-block;
  position: relative;
  font: 0.9375rem/1.45 var(--inbox-font, system-ui, sans-serif);
  color: var(--_text);
  color-scheme: light;
  text-align: start;
}
@media (prefers-color-scheme: dark) {
  :host(:not([theme="light"])) { ${DARK} color-scheme: dark; }
}
:host([theme="dark"]) { ${DARK} color-scheme: dark; }
:host([hidden]) { display: none; }
:host([inline]) { display: block; }

*, ::before, ::after { box-sizing: border-box; }
[hidden] { display: none !important; }
h2, p, ul, fieldset { margin: 0; padding: 0; border: 0; }
ul { list-style: none; }
svg { inline-size: 1.25rem; block-size: 1.25rem; fill: currentColor; display: block; }
button, select { font: inherit; color: inherit; }
button { cursor: pointer; background: none; border: 0; border-radius: 8px; padding: 0.35rem 0.6rem; }
button:hover { background: var(--_raised); }
button:disabled { opacity: 0.5; cursor: default; }
:focus-visible { outline: 2px solid var(--_accent); outline-offset: 1px; }
h2:focus { outline: none; }
.hush {
  position: absolute; inline-size: 1px; block-size: 1px; overflow: hidden;
  clip-path: inset(50%); white-space: nowrap;
}

.bell { position: relative; padding: 0.55rem; border-radius: 999px; color: var(--_text); }
.bell svg { inline-size: 1.5rem; block-size: 1.5rem; }
.badge {
  position: absolute; inset-block-start: 0; inset-inline-end: 0; min-inline-size: 1.3em;
  padding-inline: 0.35em; border-radius: 999px; background: var(--_badge); color: var(--_on-badge);
  font-size: 0.72rem; font-weight: 700; line-height: 1.6; text-align: center;
}

.panel {
  display: flex; flex-direction: column; overflow: hidden;
  background: var(--_surface); border: 1px solid var(--_border); border-radius: var(--_radius);
}
:host(:not([inline])) .panel {
  position: absolute; z-index: 1000; inset-block-start: calc(100% + 8px); inset-inline-end: 0;
  inline-size: var(--inbox-width, 25rem); max-block-size: min(40rem, 80vh);
  box-shadow: var(--_shadow);
}
:host([inline]) .panel { block-size: var(--inbox-height, 100%); }
@media (max-width: 30rem) {
  :host(:not([inline])) .panel {
    position: fixed; inset: auto 0 0; inline-size: auto; max-block-size: 85vh;
    border-end-start-radius: 0; border-end-end-radius: 0;
  }
}

.head { display: flex; align-items: center; gap: 0.25rem; padding-block: 0.7rem 0.4rem;
  padding-inline: 1rem 0.6rem;
}
.head h2 { font-size: 1.0625rem; margin-inline-end: auto; }
.all { color: var(--_accent); font-weight: 600; font-size: 0.875rem; }
.icon { padding: 0.4rem; color: var(--_muted); }
.icon:hover { color: var(--_text); }

.bar {
  display: flex; flex-wrap: wrap; gap: 0.5rem; align-items: center; justify-content: space-between;
  padding: 0.2rem 1rem 0.65rem; border-block-end: 1px solid var(--_border);
}
.views { display: flex; padding: 2px; border-radius: 9px; background: var(--_raised); }
.views button { padding: 0.2rem 0.75rem; color: var(--_muted); font-size: 0.875rem; border-radius: 7px; }
.views button[aria-pressed="true"] {
  background: var(--_surface); color: var(--_text); font-weight: 600;
  box-shadow: 0 1px 2px rgb(0 0 0 / 22%);
}
select {
  max-inline-size: 11rem; padding: 0.3rem 0.4rem; font-size: 0.875rem;
  background: var(--_surface); border: 1px solid var(--_control); border-radius: 8px;
}

.settings { flex: 0 1 auto; overflow-y: auto; padding: 0.75rem 1rem; background: var(--_raised); border-block-end: 1px solid var(--_border); }
.settings legend { padding: 0; margin-block-end: 0.35rem; font-weight: 600; font-size: 0.875rem; }
.settings label {
  display: flex; gap: 1rem; align-items: center; justify-content: space-between; padding-block: 0.3rem;
}
.settings small { display: block; color: var(--_muted); font-size: 0.8125rem; }
.switch {
  appearance: none; flex: none; position: relative; margin: 0; cursor: pointer;
  inline-size: 2.4rem; block-size: 1.4rem; border-radius: 999px;
  border: 1px solid var(--_control); background: var(--_surface); transition: background 0.15s;
}
.switch::before {
  content: ""; position: absolute; inset-block-start: 2px; inset-inline-start: 2px;
  inline-size: 1.0rem; block-size: 1.0rem; border-radius: 50%; background: var(--_control);
  transition: inset-inline-start 0.15s;
}
.switch:checked { background: var(--_accent); border-color: var(--_accent); }
.switch:checked::before { inset-inline-start: calc(100% - 1.0rem - 2px); background: var(--_on-accent); }
.switch:disabled { opacity: 0.55; cursor: not-allowed; }

.body { flex: 1 1 9rem; overflow-y: auto; overscroll-behavior: contain; min-block-size: 7rem; }
.head, .bar, .alert, .foot { flex: none; }
.item {
  display: flex; gap: 0.65rem; align-items: flex-start; padding-block: 0.7rem;
  padding-inline: 1rem 0.6rem; border-block-end: 1px solid var(--_border);
}
.item.unread { background: var(--_unread); }
.item.new { animation: arrive 0.45s ease-out; }
@keyframes arrive { from { opacity: 0; transform: translateY(-6px); } }
.dot { flex: none; inline-size: 0.55rem; block-size: 0.55rem; margin-block-start: 0.4rem; border-radius: 50%; }
.unread .dot { background: var(--_accent); }
.text { flex: 1; min-inline-size: 0; }
.message { overflow-wrap: anywhere; white-space: pre-line; unicode-bidi: plaintext; }
.unread .message { font-weight: 600; }
.message a { color: inherit; text-decoration-color: var(--_control); text-underline-offset: 2px; }
.message a:hover { color: var(--_accent); }
.meta { color: var(--_muted); font-size: 0.8125rem; }
.item button { padding: 0.3rem; color: var(--_muted); }
.item button:hover { color: var(--_text); background: var(--_surface); }

.blank { padding: 2.5rem 1.5rem; text-align: center; color: var(--_muted); }
.blank svg { inline-size: 2.25rem; block-size: 2.25rem; margin: 0 auto 0.6rem; opacity: 0.6; }
.older { display: block; margin: 0.6rem auto; color: var(--_accent); font-weight: 600; font-size: 0.875rem; }
.alert {
  padding: 0.5rem 1rem; font-size: 0.875rem; color: var(--_bad);
  background: var(--_raised); border-block-end: 1px solid var(--_border);
}
.foot {
  display: flex; align-items: center; gap: 0.45rem; padding: 0.4rem 1rem;
  color: var(--_muted); font-size: 0.8125rem; border-block-start: 1px solid var(--_border);
}
.foot::before {
  content: ""; inline-size: 0.5rem; block-size: 0.5rem; border-radius: 50%; background: var(--_control);
}
.foot[data-status="live"]::before { background: var(--_good); }
.foot[data-status="polling"]::before, .foot[data-status="connecting"]::before { background: var(--_warn); }
.foot[data-status="offline"]::before { background: var(--_bad); }

@media (prefers-reduced-motion: reduce) {
  *, ::before { animation: none !important; transition: none !important; }
}
@media (forced-colors: active) {
  .badge, .switch:checked { forced-color-adjust: none; }
  .unread .dot { background: Highlight; }
}
`;

let sheet;

export function inboxStyle() {
  if (!sheet) {
    sheet = new CSSStyleSheet();
    sheet.replaceSync(CSS);
  }
  return sheet;
}
