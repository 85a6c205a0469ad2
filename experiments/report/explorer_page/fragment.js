// The view as the fragment of the page's address, and back: only what differs from the defaults is written.
const KEYS = ["view", "x", "y", "logx", "logy", "colour", "show", "metric", "series", "find", "run"];

function toFragment(state, defaults) {
  const parts = new URLSearchParams();
  for (const key of KEYS) {
    if (state[key] !== defaults[key]) parts.append(key, String(state[key]));
  }
  for (const [name, values] of Object.entries(state.filters)) {
    // A filter that lets nothing pass is written as an empty value.
    for (const value of values.length ? values : [""]) parts.append(`only.${name}`, value);
  }
  return parts.toString();
}

// The state that a fragment asks for, and a sentence on each part of it that this page does not have.
function fromFragment(text, defaultsOf, choices) {
  const parts = new URLSearchParams(text.replace(/^#/, ""));
  const unknown = [];
  const view = parts.get("view");
  if (view !== null && !choices.view.includes(view)) unknown.push(`view=${view}`);
  const defaults = defaultsOf(choices.view.includes(view) ? view : undefined);
  const state = { ...defaults, filters: {} };
  for (const [key, value] of parts) {
    const name = key.startsWith("only.") ? key.slice(5) : null;
    if (name !== null && choices.filters[name]) {
      state.filters[name] ??= [];
      if (choices.filters[name].includes(value)) state.filters[name].push(value);
      else if (value !== "") unknown.push(`${key}=${value}`);
    } else if (!KEYS.includes(key) || (choices[key] && !choices[key].includes(value))) {
      if (key !== "view") unknown.push(`${key}=${value}`);
    } else if (key !== "view") {
      state[key] = typeof defaults[key] === "boolean" ? value === "true" : value;
    }
  }
  return { state, unknown: unknown.map((part) => `The address asks for ${part}, which is not on this page.`) };
}
