// The chart: the specification of a view in Vega-Lite, drawn by Vega. The same specification with other data is not
// compiled again.
const SHAPES = [
  "circle",
  "square",
  "diamond",
  "triangle-up",
  "cross",
  "triangle-down",
  "triangle-right",
  "triangle-left",
];

// Marks up to which each is an element of its own that a screen reader can name; more are drawn onto a canvas.
const MOST_ELEMENTS = 1000;

// How numbers at an axis are written: 20k with the prefixes of units, 0.0003 without.
const WITH_PREFIX = "abs(datum.value) < 1 ? format(datum.value, '~r') : format(datum.value, '~s')";
const AS_IT_IS = "format(datum.value, '~r')";
const LENGTH = "datum.value >= 1024 && datum.value % 1024 == 0 ? datum.value / 1024 + 'k' : '' + datum.value";

// Round numbers from the lowest to the highest of some values: of several decades 1, 3, 10, 30, ..., of few 1, 2, 5, 10.
function logTicks(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    low = Math.min(low, Math.log10(value));
    high = Math.max(high, Math.log10(value));
  }
  if (!Number.isFinite(low + high)) return undefined;
  const steps = high - low > 4 ? [1] : high - low > 1.2 ? [1, 3] : [1, 2, 5];
  const ticks = [];
  for (let decade = Math.floor(low); decade <= Math.ceil(high); decade++) {
    for (const step of steps) ticks.push(Number(`${step}e${decade}`));
  }
  return ticks;
}

// An axis whose scale is that of the data, with the ticks of all values that there are where it is logarithmic.
function axis(title, log, format, values) {
  const ticks = log ? { values: logTicks(values.filter((value) => value > 0)) } : { tickCount: 6 };
  return {
    scale: log ? { type: "log" } : { zero: false, nice: true },
    title,
    axis: { labelExpr: format, labelOverlap: true, ...ticks },
  };
}

function channel(field, options) {
  return { field, type: "quantitative", title: options.title, scale: options.scale, axis: options.axis };
}

function colourChannels(colours, width) {
  const scale = { domain: colours.map((each) => each.name), range: colours.map((each) => each.colour) };
  const legend = {
    orient: "bottom",
    columns: Math.max(1, Math.floor(width / 170)),
    symbolLimit: 0,
    labelLimit: 160,
    symbolOpacity: 1,
  };
  const shapes = { domain: scale.domain, range: colours.map((each) => SHAPES[each.shape]) };
  const title = colours.title;
  return {
    color: { field: "colour", type: "nominal", scale, legend, title },
    shape: { field: "colour", type: "nominal", scale: shapes, legend, title },
  };
}

function xySpec({ x, y, colours, width, height, description, chance }) {
  const place = { x: channel("x", x), y: channel("y", y) };
  const { color, shape } = colourChannels(colours, width);
  const opacity = { field: "opacity", type: "quantitative", scale: null, legend: null };
  const line = { type: "line", strokeWidth: 1.8, interpolate: "linear" };
  const layer = [
    { data: { name: "lines" }, mark: line, encoding: { ...place, color, opacity, detail: { field: "line" } } },
    {
      data: { name: "points" },
      mark: { type: "point", filled: true },
      encoding: {
        ...place,
        color,
        shape,
        opacity,
        description: { field: "label", type: "nominal" },
        size: { field: "size", type: "quantitative", scale: null, legend: null },
      },
    },
    {
      data: { name: "chosen" },
      mark: { type: "point", filled: false, size: 320, strokeWidth: 2.5, color: "chosen", aria: false },
      encoding: place,
    },
  ];
  if (chance !== undefined) {
    layer.unshift({
      data: { values: [{ y: chance }] },
      mark: { type: "rule", strokeDash: [4, 4], color: "quiet" },
      encoding: { y: place.y },
    });
  }
  return { width, height, autosize: { type: "fit", contains: "padding" }, description, layer };
}

function mapSpec({ settings, title, width, height, description, share }) {
  const across = Math.max(1, Math.min(settings, Math.floor(width / 230)));
  const encoding = {
    x: {
      field: "length",
      type: "ordinal",
      title: "Length of the text (tokens)",
      axis: { labelOverlap: true, labelAngle: 0, labelExpr: LENGTH },
    },
    y: {
      field: "depth",
      type: "ordinal",
      title: "Depth in the text",
      axis: { labelOverlap: true, labelExpr: "format(datum.value, '.0%')" },
    },
    color: {
      field: "value",
      type: "quantitative",
      title,
      scale: { scheme: "viridis", ...(share ? { domain: [0, 1] } : {}) },
      legend: { orient: "bottom", gradientLength: Math.min(300, width - 40) },
    },
  };
  return {
    data: { name: "cells" },
    description,
    columns: across,
    resolve: { axis: { x: "independent" } },
    facet: { field: "setting", type: "nominal", title: null, header: { labelLimit: 200 } },
    spec: {
      width: Math.floor((width - 70) / across) - 22,
      height: Math.min(height, 220),
      mark: { type: "rect" },
      encoding,
    },
  };
}

function themed(spec, theme) {
  const text = {
    labelColor: theme.text,
    titleColor: theme.text,
    labelFontSize: 12,
    titleFontSize: 13,
    titleFontWeight: 500,
  };
  const config = {
    background: theme.surface,
    font: "system-ui, sans-serif",
    view: { stroke: null },
    axis: { ...text, gridColor: theme.grid, domainColor: theme.quiet, tickColor: theme.quiet },
    legend: { ...text, symbolSize: 90 },
    header: { labelColor: theme.text, labelFontSize: 13 },
  };
  const colours = { chosen: theme.text, quiet: theme.quiet };
  const layer = spec.layer?.map((each) =>
    each.mark.color ? { ...each, mark: { ...each.mark, color: colours[each.mark.color] } } : each,
  );
  return { ...spec, ...(layer ? { layer } : {}), config };
}

class Chart {
  constructor(container) {
    this.container = container;
    this.key = null;
    this.view = null;
    this.turn = 0;
    this.queue = Promise.resolve();
    this.onHover = () => {};
    this.onChoose = () => {};
  }

  // One after another, since embedding takes several turns of the page's thread; of those that wait the last alone.
  draw(spec, datasets) {
    const turn = ++this.turn;
    const now = () => (turn === this.turn ? this.drawNow(spec, datasets) : undefined);
    this.queue = this.queue.then(now, now);
    return this.queue;
  }

  async drawNow(spec, datasets) {
    const marks = Object.values(datasets).reduce((sum, rows) => sum + rows.length, 0);
    const renderer = marks > MOST_ELEMENTS ? "canvas" : "svg";
    const key = JSON.stringify([spec, renderer]);
    if (key !== this.key) {
      this.clear();
      this.view = await this.make({ ...spec, datasets }, renderer);
      this.key = key;
      return;
    }
    for (const [name, rows] of Object.entries(datasets)) this.view.data(name, rows);
    await this.view.runAsync();
  }

  async make(spec, renderer) {
    // Warnings are off: a layer without points has no extent, and that is as it should be.
    const options = {
      logLevel: 1,
      mode: "vega-lite",
      renderer,
      actions: false,
      tooltip: false,
      hover: false,
      defaultStyle: false,
    };
    const { view } = await vegaEmbed(this.container, spec, options);
    const datum = (item) => (item && item.datum && item.datum.run !== undefined ? item.datum : null);
    view.addEventListener("pointermove", (event, item) => this.onHover(datum(item), event));
    view.addEventListener("pointerout", (event) => this.onHover(null, event));
    view.addEventListener("click", (event, item) => this.onChoose(datum(item)));
    return view;
  }

  async choose(point) {
    if (this.view && this.key.includes('"chosen"')) await this.view.data("chosen", point ? [point] : []).runAsync();
  }

  svg() {
    return this.view.toSVG();
  }

  clear() {
    this.view?.finalize();
    this.view = this.key = null;
    this.container.replaceChildren();
  }
}
