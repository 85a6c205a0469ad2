// The form of the page: its lists, its filters, and the state that they stand for.
const SHOWN = { both: "Seeds and medians", seeds: "Seeds", medians: "Medians over seeds" };
const COLOURS = ["family", "model", "arm", "study", "task", "state_format", "lr", "seed"];

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function fill(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, label]) => element("option", { value, textContent: label })));
  if (chosen !== undefined) select.value = chosen;
}

// All that can be chosen, by the name of the control.
function choicesIn(data) {
  const numbers = Object.keys(data.fields).filter((name) => data.fields[name].number);
  const x = numbers.filter((name) => data.rows.some((row) => row[name] !== undefined));
  const filters = {};
  for (const name of FILTERS) {
    const found = choicesOf(data.rows, name).map(String);
    if (found.length > 1) filters[name] = found;
  }
  return {
    view: Object.keys(VIEWS),
    x,
    y: x,
    filters,
    show: Object.keys(SHOWN),
    metric: Object.keys(data.metrics),
    series: Object.keys(data.series),
    colour: COLOURS.filter((name) => data.rows.some((row) => row[name] !== undefined)),
  };
}

// Whether there is anything to show in a view.
function hasView(name, data) {
  const view = VIEWS[name];
  if (view.kind === "map") return data.maps.length > 0;
  if (view.kind === "curves") return seriesOf(name, data).length > 0;
  return data.rows.some((row) => row[view.x] !== undefined && row[view.y] !== undefined);
}

function seriesOf(name, data) {
  const begins = VIEWS[name].series ?? [];
  return Object.keys(data.series).filter((kind) => begins.some((each) => kind.startsWith(each)));
}

// The runs that a view, or one kind of curves in it, could show.
function rowsOfView(name, data, series) {
  const { kind } = VIEWS[name];
  const numbers = {
    runs: () => null,
    map: () => data.maps.map(({ row }) => row),
    curves: () => data.series[series]?.lines.map(([number]) => number) ?? [],
  }[kind]();
  return numbers === null ? data.rows : numbers.map((number) => data.rows[number]);
}

function commonMetric(rows) {
  const counts = groupBy(
    rows.filter((row) => row.metric !== undefined),
    (row) => row.metric,
  );
  return [...counts].sort((a, b) => b[1].length - a[1].length)[0]?.[0] ?? "";
}

// The first kind of curves of a view that runs of that metric have, or else the first.
function seriesFor(name, data, metric) {
  const kinds = seriesOf(name, data);
  return kinds.find((kind) => rowsOfView(name, data, kind).some((row) => row.metric === metric)) ?? kinds[0] ?? "";
}

// The state of a view before anything is chosen.
function defaultState(data, name) {
  const view = name ?? Object.keys(VIEWS).find((each) => hasView(each, data)) ?? "state";
  const { kind, x = "state_bytes", y = "test" } = VIEWS[view];
  const series = seriesFor(view, data, commonMetric(data.rows));
  const metric = commonMetric(rowsOfView(view, data, series)) || commonMetric(data.rows);
  return {
    view,
    x,
    y,
    logx: kind === "runs" ? data.fields[x].log : false,
    logy: kind === "runs" ? data.fields[y].log : false,
    colour: "family",
    show: "both",
    metric,
    series,
    find: "",
    run: "",
    filters: {},
  };
}

class Controls {
  constructor(data, onChange) {
    this.data = data;
    this.choices = choicesIn(data);
    this.form = document.getElementById("controls");
    this.find = document.querySelector("[name=find]");
    this.onChange = onChange;
    const views = Object.entries(VIEWS).map(([name, view]) => [
      name,
      hasView(name, data) ? view.label : `${view.label} (none recorded)`,
    ]);
    fill(this.control("view"), views);
    for (const name of ["x", "y"])
      fill(
        this.control(name),
        this.choices.x.map((each) => [each, data.fields[each].label]),
      );
    fill(
      this.control("colour"),
      this.choices.colour.map((each) => [each, data.fields[each].label]),
    );
    fill(this.control("show"), Object.entries(SHOWN));
    fill(
      this.control("metric"),
      Object.values(data.metrics).map((metric) => [metric.name, metric.label]),
    );
    this.form.addEventListener("change", (event) =>
      onChange(event.target.name, event.target.type === "checkbox" ? event.target.checked : event.target.value),
    );
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.find.addEventListener("input", () => onChange("find", this.find.value));
    document.getElementById("choices").append(...Object.keys(this.choices.filters).map((name) => this.filter(name)));
  }

  control(name) {
    return this.form.elements[name];
  }

  filter(name) {
    const { label } = this.data.fields[name];
    const set = element("fieldset", { name: `only.${name}` });
    const chosen = () => [...set.querySelectorAll("input:checked")].map((box) => box.value);
    const all = (checked) => () => {
      for (const box of set.querySelectorAll("input")) box.checked = checked;
      this.onChange(`only.${name}`, chosen());
    };
    const button = (text, checked) =>
      element("button", { type: "button", textContent: text, ariaLabel: `${label}: ${text}`, onclick: all(checked) });
    const options = this.choices.filters[name].map((value) =>
      element("label", {}, element("input", { type: "checkbox", value, checked: true }), value),
    );
    set.append(
      element("legend", {}, label, button("all", true), button("none", false)),
      element("div", { className: "options" }, ...options),
    );
    set.addEventListener("change", () => this.onChange(`only.${name}`, chosen()));
    return set;
  }

  // Make the form say what the state is.
  show(state) {
    const { kind } = VIEWS[state.view];
    const kinds = showsMetric(state, this.data) && this.choices.metric.length > 1 ? [kind, "metric"] : [kind];
    for (const label of this.form.querySelectorAll("label[data-kind]")) {
      label.hidden = !label.dataset.kind.split(" ").some((each) => kinds.includes(each));
    }
    fill(
      this.control("series"),
      seriesOf(state.view, this.data).map((name) => [name, this.data.series[name].label]),
    );
    for (const name of ["view", "x", "y", "series", "metric", "colour", "show"]) this.control(name).value = state[name];
    for (const name of ["logx", "logy"]) this.control(name).checked = state[name];
    if (this.find.value !== state.find) this.find.value = state.find;
    for (const name of Object.keys(this.choices.filters)) {
      const chosen = state.filters[name] && new Set(state.filters[name]);
      for (const box of document.querySelectorAll(`fieldset[name="only.${name}"] input`))
        box.checked = !chosen || chosen.has(box.value);
    }
    const active = Object.keys(state.filters).map((name) => this.data.fields[name].label);
    document.getElementById("active").textContent = active.length ? `(${active.join(", ")})` : "";
  }
}
