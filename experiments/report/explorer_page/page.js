// The page: a change of a control changes the state, the state is drawn and written into the address.
class Explorer {
  constructor(data) {
    this.data = data;
    this.controls = new Controls(data, (name, value) => this.change(name, value));
    this.chart = new Chart(document.getElementById("chart"));
    this.tip = document.getElementById("tip");
    this.count = ROWS_AT_ONCE;
    this.point = null;
    this.settled = Promise.resolve();
    this.milliseconds = 0;
    this.chart.onHover = (point, event) => showTip(this.tip, data, point, this.labels(), event);
    this.chart.onChoose = (point) => this.choose(point);
    this.listen();
    this.restore();
  }

  listen() {
    const on = (id, action) => document.getElementById(id).addEventListener("click", action);
    on("save-svg", async () => save("runs.svg", "image/svg+xml", await this.chart.svg()));
    on("save-csv", () => save("runs.csv", "text/csv", csvText(this.shown.table.columns, this.shown.table.rows)));
    on("reset", () => this.replace(this.defaults()));
    on("copy", () => navigator.clipboard.writeText(this.data.rows[this.point.run].command));
    on("more", () => {
      this.count += ROWS_AT_ONCE;
      this.showRuns();
    });
    document.getElementById("runs").addEventListener("toggle", () => this.showRuns());
    document.getElementById("chart").addEventListener("keydown", (event) => this.step(event));
    window.addEventListener("hashchange", () => {
      if (location.hash.slice(1) !== this.written) this.restore();
    });
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    let width = document.documentElement.clientWidth;
    window.addEventListener("resize", () => {
      if (document.documentElement.clientWidth !== width) this.draw();
      width = document.documentElement.clientWidth;
    });
  }

  // A state of its own that may be changed.
  defaults(view = "") {
    this.known ??= new Map();
    if (!this.known.has(view)) this.known.set(view, defaultState(this.data, view || undefined));
    return { ...this.known.get(view), filters: {} };
  }

  restore() {
    const { state, unknown } = fromFragment(location.hash, (view) => this.defaults(view), this.controls.choices);
    const isGiven = location.hash.includes("series=") && seriesOf(state.view, this.data).includes(state.series);
    if (!isGiven) state.series = seriesFor(state.view, this.data, state.metric);
    showProblems(this.data.problems, unknown);
    this.state = state;
    const row = state.run && this.data.rows.find((each) => each.key === state.run);
    this.settled = this.draw().then(() => (row ? this.chooseRow(row) : this.choose(null)));
  }

  replace(state) {
    this.state = state;
    this.settled = this.draw().then(() => this.choose(null));
  }

  change(name, value) {
    const before = performance.now();
    if (name.startsWith("only.")) this.filter(name.slice(5), value);
    else if (name === "view")
      this.state = { ...this.defaults(value), filters: this.state.filters, find: this.state.find };
    else this.state[name] = value;
    if (name === "metric") this.state.series = seriesFor(this.state.view, this.data, value);
    if (name === "series")
      this.state.metric = commonMetric(rowsOfView(this.state.view, this.data, value)) || this.state.metric;
    if (name === "x" || name === "y") this.state[`log${name}`] = this.data.fields[value].log;
    this.count = ROWS_AT_ONCE;
    this.settled = this.draw()
      .then(() => this.chooseAgain())
      .then(() => {
        this.milliseconds = performance.now() - before;
      });
    return this.settled;
  }

  // The chosen point in a view that has changed, where it is there.
  chooseAgain() {
    if (!this.point) return undefined;
    const { run, seeds } = this.point;
    return this.choose(this.marks.find((point) => point.run === run && point.seeds > 1 === seeds > 1) ?? null);
  }

  filter(name, chosen) {
    if (chosen.length === this.controls.choices.filters[name].length) delete this.state.filters[name];
    else this.state.filters[name] = chosen;
  }

  labels() {
    const { data, state } = this;
    const metric = data.metrics[state.metric];
    const of = (name) => {
      if (!OF_METRIC.includes(name) || !metric) return data.fields[name].label;
      const unit = metric.unit && !metric.label.toLowerCase().includes("bits") ? ` (${metric.unit})` : "";
      return `${metric.label}${unit} on ${name}`;
    };
    if (VIEWS[state.view].kind === "runs") return { x: of(state.x), y: of(state.y) };
    if (VIEWS[state.view].kind === "map") return { x: "Length", y: metric?.label ?? "Metric" };
    const series = data.series[state.series];
    return { x: series?.x_label ?? "", y: series?.y_label || metric?.label || "Metric" };
  }

  async draw() {
    const { data, state } = this;
    this.controls.show(state);
    this.write();
    const rows = shownRows(data, state);
    const colours = colourScale(data, state, theme());
    const make = { runs: runsView, curves: curvesView, map: mapView }[VIEWS[state.view].kind];
    this.shown = make(data, state, rows, colours.nameOf);
    this.marks = this.shown.points.length ? this.shown.points : (this.shown.cells ?? this.shown.lines);
    this.caption(rows.length);
    this.showRuns();
    const container = document.getElementById("chart");
    const empty = document.getElementById("empty");
    container.hidden = this.marks.length === 0;
    empty.hidden = !container.hidden;
    document.getElementById("save-svg").disabled = container.hidden;
    if (container.hidden) {
      empty.textContent = data.count ? "No run that passes the filters has anything to plot here." : emptyText(data);
      return;
    }
    const { points, lines, cells } = this.shown;
    await this.chart.draw(this.spec(colours, container), cells ? { cells } : { points, lines });
  }

  spec(colours, container) {
    const { data, state, shown } = this;
    const labels = this.labels();
    const width = Math.floor(container.clientWidth);
    const height = Math.max(300, Math.min(480, Math.round(width * 0.62)));
    const description = `${VIEWS[state.view].label}: ${labels.y} against ${labels.x}, ${shown.rows.length} runs`;
    if (shown.cells) {
      const settings = new Set(shown.cells.map((cell) => cell.setting)).size;
      const share = data.metrics[state.metric]?.unit === "";
      return themed(mapSpec({ settings, title: labels.y, width, height, description, share }), theme());
    }
    const isRuns = VIEWS[state.view].kind === "runs";
    const all = (name) => (isRuns ? data.rows.map((row) => row[state[name]]) : shown.lines.map((point) => point[name]));
    const of = (name, log) => axis(labels[name], log, axisFormat(state[name], isRuns), log ? all(name) : []);
    const present = new Set([...shown.points, ...shown.lines].map((point) => point.colour));
    const used = colours.scale.filter((each) => present.has(each.name));
    used.title = data.fields[state.colour].label;
    const spec = {
      x: of("x", state.logx),
      y: of("y", state.logy),
      colours: used,
      width,
      height,
      description,
      chance: this.chance(),
    };
    return themed(xySpec(spec), theme());
  }

  // The level of guessing, where all runs that are shown have the same one.
  chance() {
    const levels = new Set(this.shown.rows.map((row) => row.chance));
    const [level] = levels;
    const { kind } = VIEWS[this.state.view];
    const isMetric =
      kind === "runs"
        ? OF_METRIC.includes(this.state.y)
        : kind === "curves" && !this.data.series[this.state.series]?.y_label;
    return isMetric && levels.size === 1 && !(this.state.logy && level <= 0) ? level : undefined;
  }

  caption(passing) {
    const { rows, every } = this.shown;
    const runs = new Set(rows).size;
    const parts = [`${runs} of ${this.data.count} runs`];
    if (runs < passing) parts.push(`${passing - runs} more pass the filters and have nothing to plot here`);
    if (this.shown.cells) parts.push("an empty cell has no question");
    if (every > 1) parts.push(`of each curve every ${every}th point is drawn, the CSV has all`);
    if (runs && this.chance() !== undefined) parts.push("the dashed line is chance");
    document.getElementById("caption").textContent = `${parts.join("; ")}.`;
  }

  showRuns() {
    if (!document.getElementById("runs").open) return;
    const rows = [...new Set(this.shown.rows)];
    const axes = VIEWS[this.state.view].kind === "runs" ? [this.state.x, this.state.y] : [];
    const columns = [...new Set(["run", "model", "seed", ...axes, "test"])];
    showTable(document.querySelector("#runs table"), this.data, rows, columns, this.count, (row) =>
      this.chooseRow(row),
    );
    document.getElementById("more").hidden = rows.length <= this.count;
  }

  chooseRow(row) {
    const alike = this.marks.filter((point) => point.run === row.number);
    return this.choose(alike.find((point) => point.seeds === 1) ?? alike[0] ?? { run: row.number, seeds: 1 });
  }

  async choose(point) {
    this.point = point;
    this.state.run = point ? this.data.rows[point.run].key : "";
    this.write();
    showChosen(document.getElementById("chosen"), this.data, point, this.labels());
    await this.chart.choose(point && point.x !== undefined ? point : null);
  }

  // From point to point with the arrow keys, in the order of the horizontal axis.
  step(event) {
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };
    if (event.key === "Escape") {
      this.choose(null);
      return;
    }
    if (!(event.key in steps) || this.marks.length === 0) return;
    event.preventDefault();
    const place = (point) => point.x ?? point.length;
    const inOrder = [...this.marks].sort((a, b) => place(a) - place(b) || (a.y ?? a.depth) - (b.y ?? b.depth));
    const now = inOrder.findIndex(
      (point) =>
        this.point &&
        point.run === this.point.run &&
        place(point) === place(this.point) &&
        point.y === this.point.y &&
        point.depth === this.point.depth &&
        point.seeds === this.point.seeds,
    );
    const next = Math.max(0, Math.min(inOrder.length - 1, now + steps[event.key]));
    this.settled = this.choose(inOrder[next]);
  }

  write() {
    const view = this.state.view === this.defaults().view ? "" : `view=${this.state.view}`;
    this.written = [view, toFragment(this.state, this.defaults(this.state.view))].filter(Boolean).join("&");
    history.replaceState(null, "", this.written ? `#${this.written}` : location.pathname + location.search);
  }
}

function axisFormat(name, isRuns) {
  const large = ["state_bytes", "parameters", "flops", "tokens_per_second", "length", "steps"];
  return isRuns && large.includes(name) ? WITH_PREFIX : AS_IT_IS;
}

function theme() {
  const style = getComputedStyle(document.documentElement);
  const value = (name) => style.getPropertyValue(`--${name}`).trim();
  const dark = window.matchMedia("(prefers-color-scheme: dark)").matches;
  return {
    surface: value("surface"),
    text: value("text"),
    quiet: value("quiet"),
    grid: value("grid"),
    name: dark ? "dark" : "light",
  };
}

// A colour and a shape for each value of the field that colours tell apart; families have theirs throughout.
function colourScale(data, state, { name }) {
  const { families, others } = data.palette[name];
  const values = choicesOf(data.rows, state.colour).map(String);
  const scale = values.map((value, i) => ({
    name: value,
    colour: state.colour === "family" ? (families[value] ?? others[i % others.length]) : others[i % others.length],
    shape: i % SHAPES.length,
  }));
  return { scale, nameOf: (row) => String(row[state.colour] ?? NONE) };
}

function emptyText(data) {
  const places = data.sources.join(", ") || "nothing was given";
  return `No run is recorded here (${places}). Once a sweep has trained something, write this page again.`;
}

function showProblems(problems, unknown) {
  const section = document.getElementById("problems");
  const all = [...unknown, ...problems];
  section.hidden = all.length === 0;
  section.querySelector("h2").textContent = problems.length
    ? `${problems.length} could not be read`
    : "Not on this page";
  section.querySelector("ul").replaceChildren(...all.map((text) => element("li", { textContent: text })));
}

function save(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

// A text that the file holds compressed.
async function unpacked(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

async function open() {
  const [drawing, text] = await Promise.all(["drawing", "data"].map(unpacked));
  document.head.append(element("script", { textContent: drawing }));
  const data = readData(text);
  const from = data.sources.length ? ` from ${data.sources.join(", ")}` : "";
  const summary = `${data.count} recorded ${data.count === 1 ? "run" : "runs"}${from}.`;
  document.getElementById("summary").textContent = summary;
  window.explorer = new Explorer(data);
}

open().catch((error) => {
  document.getElementById("summary").textContent = `This page cannot be shown: ${error}.`;
  throw error;
});
