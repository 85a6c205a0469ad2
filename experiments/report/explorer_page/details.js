// One run in words: in the tip at the pointer, in the section of the chosen run, and as a line of the table of runs.
const ROWS_AT_ONCE = 50;
const IN_TIP = ["study", "task", "arm", "state_format", "seed", "lr"];

function numberText(value) {
  if (!Number.isFinite(value)) return value === undefined ? "" : String(value);
  if (Number.isInteger(value)) return Math.abs(value) < 1e12 ? value.toLocaleString("en") : value.toExponential(3);
  return String(Number(value.toPrecision(5)));
}

function fieldText(data, name, value) {
  return data.fields[name].number ? numberText(value) : String(value);
}

// What the point of a view says beside the run: its place, and of how many seeds it is.
function pointEntries(point, labels) {
  const seeds = point.seeds > 1 ? [["Median over", `${point.seeds} seeds`]] : [];
  if (point.value !== undefined) {
    return [
      ["Length", numberText(point.length)],
      ["Depth", numberText(point.depth)],
      [labels.y, numberText(point.value)],
      ["Answers", numberText(point.count)],
      ...(point.seeds > 1 ? [["Mean over", `${point.seeds} runs`]] : []),
    ];
  }
  return [...seeds, [labels.x, numberText(point.x)], [labels.y, numberText(point.y)]];
}

function showTip(tip, data, point, labels, event) {
  tip.hidden = !point;
  if (!point) return;
  const row = data.rows[point.run];
  const entries = [
    ...pointEntries(point, labels),
    ...IN_TIP.filter((name) => row[name] !== undefined && !(name === "seed" && point.seeds > 1)).map((name) => [
      data.fields[name].label,
      fieldText(data, name, row[name]),
    ]),
  ];
  tip.replaceChildren(
    element("strong", { textContent: point.seeds > 1 ? (row.arm ?? row.model) : row.run }),
    definitions(entries),
    element("code", { textContent: row.command ?? "" }),
  );
  const { innerWidth, innerHeight } = window;
  const { width, height } = tip.getBoundingClientRect();
  const left = event.clientX + 16 + width > innerWidth ? event.clientX - width - 16 : event.clientX + 16;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${Math.max(8, Math.min(event.clientY + 16, innerHeight - height - 8))}px`;
}

function definitions(entries) {
  return element(
    "dl",
    {},
    ...entries.flatMap(([term, text]) => [element("dt", { textContent: term }), element("dd", { textContent: text })]),
  );
}

function showChosen(section, data, point, labels) {
  section.hidden = !point;
  if (!point) return;
  const row = data.rows[point.run];
  const entries = Object.keys(data.fields)
    .filter((name) => row[name] !== undefined && name !== "command")
    .map((name) => [data.fields[name].label, fieldText(data, name, row[name])]);
  const list = definitions([...(point.seeds > 1 ? pointEntries(point, labels) : []), ...entries]);
  if (row.command)
    list.append(
      element("dt", { textContent: "Command" }),
      element("dd", {}, element("code", { textContent: row.command })),
    );
  section.querySelector("dl").replaceWith(list);
  document.getElementById("copy").parentElement.hidden = !row.command || !navigator.clipboard;
}

// The table of the runs that are shown, so many of them.
function showTable(table, data, rows, columns, count, onChoose) {
  const number = (name) => (data.fields[name].number ? "number" : "");
  table.tHead.rows[0].replaceChildren(
    ...columns.map((name) =>
      element("th", { scope: "col", className: number(name), textContent: data.fields[name].label }),
    ),
  );
  const cell = (row, name) =>
    name === "run"
      ? element("td", {}, element("button", { type: "button", textContent: row.run, onclick: () => onChoose(row) }))
      : element("td", {
          className: number(name),
          textContent: row[name] === undefined ? "" : fieldText(data, name, row[name]),
        });
  table.tBodies[0].replaceChildren(
    ...rows.slice(0, count).map((row) => element("tr", {}, ...columns.map((name) => cell(row, name)))),
  );
}
