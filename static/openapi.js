// Shows the service's OpenAPI document. Everything becomes text nodes, never markup.

const METHODS = ["get", "post", "put", "patch", "delete"];

const main = document.getElementById("document");
const state = document.getElementById("state");

function element(name, properties = {}, ...children) {
  const it = Object.assign(document.createElement(name), properties);
  it.append(...children);
  return it;
}

// Backquotes in descriptions become <code>, blank lines paragraphs.
function prose(text = "") {
  return text
    .split(/\n{2,}/)
    .filter((paragraph) => paragraph.trim())
    .map((paragraph) =>
      element(
        "p",
        {},
        ...paragraph
          .split("`")
          .map((part, index) => (index % 2 ? element("code", { textContent: part }) : part)),
      ),
    );
}

const code = (value) =>
  element("pre", {}, element("code", {
    textContent: typeof value === "string" ? value : JSON.stringify(value, null, 2),
  }));

// A schema in a line: what a reader wants to know first.
function brief(schema = {}) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(brief).join(" or ");
  if (schema.enum) return schema.enum.map((it) => JSON.stringify(it)).join(" | ");
  if ("const" in schema) return JSON.stringify(schema.const);
  let text = schema.type ?? "anything";
  if (schema.type === "array") text = `list of ${brief(schema.items)}`;
  if (schema.type === "object" && schema.additionalProperties)
    text = `object of ${brief(schema.additionalProperties)}`;
  const limits = ["minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "pattern"]
    .filter((name) => name in schema)
    .map((name) => `${name} ${schema[name]}`);
  if ("default" in schema) limits.push(`default ${JSON.stringify(schema.default)}`);
  return limits.length ? `${text} (${limits.join(", ")})` : text;
}

function members(entries) {
  return element(
    "dl",
    {},
    ...entries.flatMap(([name, about, description]) => [
      element("dt", { textContent: `${name}: ${about}` }),
      element("dd", {}, ...prose(description)),
    ]),
  );
}

function content(part, spec) {
  return Object.entries(part?.content ?? {}).flatMap(([type, media]) => {
    const shown = [element("p", { textContent: `${type}: ${brief(media.schema)}` })];
    const target = media.schema?.$ref && spec.components.schemas[brief(media.schema)];
    if (target?.properties) {
      const required = new Set(target.required);
      shown.push(
        members(
          Object.entries(target.properties).map(([name, it]) => [
            name + (required.has(name) ? "" : "?"),
            brief(it),
            it.description,
          ]),
        ),
      );
    }
    if (media["x-events"])
      shown.push(members(Object.entries(media["x-events"]).map(([name, it]) => [name, brief(it)])));
    if ("example" in media) shown.push(code(media.example));
    return shown;
  });
}

function operation(method, path, it, spec) {
  const needs = (it.security ?? []).flatMap(Object.keys);
  return element(
    "details",
    { id: it.operationId },
    element(
      "summary",
      {},
      element("span", { className: "method", textContent: method }),
      " ",
      element("span", { className: "path", textContent: path }),
      ` ${it.summary}`,
    ),
    ...prose(it.description),
    ...(needs.length ? [element("p", { textContent: `Needs: ${needs.join(", ")}` })] : []),
    ...(it.parameters?.length
      ? [
          element("h4", { textContent: "Parameters" }),
          members(
            it.parameters.map((parameter) => [
              `${parameter.name} (${parameter.in}${parameter.required ? ", required" : ""})`,
              brief(parameter.schema),
              parameter.description,
            ]),
          ),
        ]
      : []),
    ...(it.requestBody ? [element("h4", { textContent: "Body" }), ...content(it.requestBody, spec)] : []),
    element("h4", { textContent: "Answers" }),
    ...Object.entries(it.responses).map(([status, answer]) =>
      element(
        "details",
        {},
        element("summary", { textContent: `${status} ${answer.description.replaceAll("`", "")}` }),
        ...content(answer, spec),
      ),
    ),
  );
}

function show(spec) {
  const parts = [
    element("h1", { textContent: `${spec.info.title} ${spec.info.version}: HTTP API` }),
    ...prose(spec.info.description),
    element("p", {}, element("a", { href: "/api/openapi.json", textContent: "OpenAPI document" })),
  ];
  for (const tag of spec.tags) {
    parts.push(element("h2", { textContent: tag.name }));
    for (const [path, methods] of Object.entries(spec.paths))
      for (const method of METHODS)
        if (methods[method]?.tags.includes(tag.name))
          parts.push(operation(method, path, methods[method], spec));
  }
  parts.push(element("h2", { textContent: "Schemas" }));
  for (const [name, schema] of Object.entries(spec.components.schemas))
    parts.push(
      element("details", { id: name }, element("summary", { textContent: name }), code(schema)),
    );
  main.replaceChildren(...parts);
  const wanted = location.hash && document.getElementById(location.hash.slice(1));
  if (wanted) {
    wanted.open = true;
    wanted.scrollIntoView();
  }
}

try {
  const response = await fetch("/api/openapi.json");
  if (!response.ok) throw new Error(`status ${response.status}`);
  show(await response.json());
} catch (error) {
  state.textContent = `The document could not be loaded: ${error.message}`;
}
