// What each view plots: its axes, its points, lines or cells, made of the runs that pass the filters.
const VIEWS = {
  state: { label: "Recall against state", kind: "runs", x: "state_bytes", y: "test" },
  flops: { label: "Quality against FLOPs", kind: "runs", x: "flops", y: "test" },
  rates: { label: "Learning rates", kind: "runs", x: "lr", y: "test", lines: true },
  speed: { label: "Tokens per second against context", kind: "runs", x: "length", y: "tokens_per_second", lines: true },
  position: { label: "Along position, gap or length", kind: "curves", series: ["along/", "by/"] },
  training: { label: "Course of training", kind: "curves", series: ["training/"] },
  maps: { label: "Needle maps: depth by length", kind: "map" },
};

const OF_METRIC = ["test", "validation"];

// Points of curves that are drawn at most: beyond them every second, third, ... point of each curve is.
const MOST_POINTS = 4000;

const OPACITY = { seed: 0.55, median: 1 };

function usable(row, name, log) {
  return Number.isFinite(row[name]) && !(log && row[name] <= 0);
}

// Whether a view shows the metric, so that runs of one metric alone can be compared.
function showsMetric(state, data) {
  const view = VIEWS[state.view];
  if (view.kind === "runs") return OF_METRIC.includes(state.x) || OF_METRIC.includes(state.y);
  return view.kind === "map" || !data.series[state.series]?.y_label;
}

function shownRows(data, state) {
  const rows = filterRows(data.rows, state);
  return showsMetric(state, data) ? rows.filter((row) => row.metric === state.metric) : rows;
}

// The points of the runs: [seed by seed, medians], each with the number of its run, or of the first of its seeds.
function runPoints(rows, state, colourOf) {
  const found = rows.filter((row) => usable(row, state.x, state.logx) && usable(row, state.y, state.logy));
  const seeds = found.map((row) => ({
    x: row[state.x],
    y: row[state.y],
    colour: colourOf(row),
    run: row.number,
    seeds: 1,
    opacity: OPACITY.seed,
    size: 45,
    label: row.run,
  }));
  const medians = [...groupBy(found, sameButSeed).values()].map((members) => ({
    x: median(members.map((row) => row[state.x])),
    y: median(members.map((row) => row[state.y])),
    colour: colourOf(members[0]),
    run: members[0].number,
    seeds: members.length,
    opacity: OPACITY.median,
    size: 110,
    label: `median of ${members.length} like ${members[0].run}`,
    line: sameBut(members[0], state.x),
  }));
  return { found, seeds, medians };
}

function runsView(data, state, rows, colourOf) {
  const { found, seeds, medians } = runPoints(rows, state, colourOf);
  const points = { seeds, medians, both: [...seeds, ...medians] }[state.show];
  const lines = VIEWS[state.view].lines && state.x === VIEWS[state.view].x ? medians : [];
  const columns = Object.keys(data.fields);
  return { points, lines, rows: found, table: { columns, rows: found } };
}

// A curve of each run, or the median of those that differ in the seed alone where they have the same x.
function curvesView(data, state, rows, colourOf) {
  const shown = new Map(rows.map((row) => [row.number, row]));
  const lines = data.series[state.series]?.lines.filter(([number]) => shown.has(number)) ?? [];
  const found = lines.map(([number, x, y]) => ({ row: shown.get(number), x, y, seeds: 1 }));
  const medians = state.show === "seeds" ? [] : medianCurves(found);
  const drawn = [
    ...(state.show === "medians" ? [] : found.map((each) => ({ ...each, opacity: state.show === "both" ? 0.3 : 0.7 }))),
    ...medians.map((each) => ({ ...each, opacity: OPACITY.median })),
  ];
  const total = drawn.reduce((sum, each) => sum + each.x.length, 0);
  const every = Math.max(1, Math.ceil(total / MOST_POINTS));
  const points = drawn.flatMap((each, line) => curvePoints(each, line, state, every, colourOf(each.row)));
  const own = ["run", "study", "task", "model", "family", "seed", "lr", "metric"];
  const table = found.flatMap(({ row, x, y }) => x.map((value, i) => ({ ...row, x: value, y: y[i] })));
  return {
    points: [],
    lines: points,
    rows: found.map(({ row }) => row),
    every,
    table: { columns: [...own, "x", "y"], rows: table },
  };
}

function medianCurves(found) {
  const groups = groupBy(found, ({ row, x }) => `${sameButSeed(row)}|${x.length}|${x[0]}|${x.at(-1)}`);
  return [...groups.values()].map((members) => ({
    row: members[0].row,
    x: members[0].x,
    seeds: members.length,
    y: members[0].x.map((_, i) => median(members.map((each) => each.y[i]))),
  }));
}

function curvePoints(each, line, state, every, colour) {
  const places = each.x.map((_, i) => i).filter((i) => i % every === 0 || i === each.x.length - 1);
  return places
    .filter((i) => !(state.logx && each.x[i] <= 0) && !(state.logy && each.y[i] <= 0))
    .map((i) => ({
      x: each.x[i],
      y: each.y[i],
      colour,
      line,
      run: each.row.number,
      seeds: each.seeds,
      opacity: each.opacity,
    }));
}

// The metric by depth and length, the mean over all answers of the seeds of each setting.
function mapView(data, state, rows) {
  const shown = new Map(rows.map((row) => [row.number, row]));
  const found = data.maps.filter(({ row }) => shown.has(row)).map((each) => ({ ...each, row: shown.get(each.row) }));
  const names = settingNames(found.map(({ row }) => row));
  const cells = [];
  for (const [key, members] of groupBy(found, ({ row }) => sameButSeed(row))) {
    for (const [place, sums] of groupBy(members.flatMap(cellsOf), (cell) => `${cell.length}|${cell.depth}`)) {
      const count = sums.reduce((sum, cell) => sum + cell.count, 0);
      const total = sums.reduce((sum, cell) => sum + cell.count * cell.value, 0);
      if (count)
        cells.push({
          setting: names.get(key),
          length: sums[0].length,
          depth: sums[0].depth,
          value: total / count,
          count,
          run: members[0].row.number,
          seeds: members.length,
        });
    }
  }
  const columns = ["setting", "length", "depth", "value", "count", "seeds"];
  return { points: [], lines: [], cells, rows: found.map(({ row }) => row), table: { columns, rows: cells } };
}

function cellsOf({ lengths, edges, values, counts }) {
  return lengths.flatMap((length, i) =>
    values[i].map((value, d) => ({
      length,
      depth: (edges[d] + edges[d + 1]) / 2,
      value: value ?? 0,
      count: value === null ? 0 : counts[i][d],
    })),
  );
}
