// The recorded runs of this page: read from its data, filtered, grouped into medians over seeds, written as CSV.
"use strict";

const FILTERS = ["study", "task", "family", "model", "arm", "state_format", "status", "lr", "seed"];

// What a filter calls a run that has no value there.
const NONE = "(none)";

// Columns of text are kept as their distinct values and, for each run, which of them; -1 is none.
function readData(text) {
  const data = JSON.parse(text);
  const names = Object.keys(data.columns);
  data.rows = Array.from({ length: data.count }, (_, number) => ({ number }));
  for (const name of names) {
    const { values, places } = data.columns[name];
    for (let i = 0; i < data.count; i++) {
      const value = places ? (places[i] < 0 ? null : values[places[i]]) : values[i];
      if (value !== null) data.rows[i][name] = value;
    }
  }
  delete data.columns;
  // Several records may be of one run: the address tells them apart by a number.
  for (const alike of groupBy(data.rows, (row) => row.run).values()) {
    alike.forEach((row, place) => {
      row.key = place ? `${row.run}@${place + 1}` : row.run;
    });
  }
  return data;
}

function choicesOf(rows, name) {
  const found = new Set(rows.map((row) => row[name] ?? NONE));
  const number = (value) => (typeof value === "number" ? value : Infinity);
  return [...found].sort((a, b) => number(a) - number(b) || String(a).localeCompare(String(b)));
}

// Filters hold the chosen values as text; one that is not there lets every run pass.
function filterRows(rows, state) {
  const chosen = Object.entries(state.filters).map(([name, values]) => [name, new Set(values)]);
  const words = state.find.toLowerCase().split(/\s+/).filter(Boolean);
  return rows.filter(
    (row) =>
      chosen.every(([name, values]) => values.has(String(row[name] ?? NONE))) &&
      words.every((word) => `${row.run} ${row.pattern} ${row.arm ?? ""}`.toLowerCase().includes(word)),
  );
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

function groupBy(items, key) {
  const groups = new Map();
  for (const item of items) {
    const name = key(item);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(item);
  }
  return groups;
}

// Runs that differ in the seed alone.
function sameButSeed(row) {
  return [row.setting, row.lr, row.state_format, row.length].join("|");
}

// Those that differ in one more number, along which a line joins their medians.
function sameBut(row, name) {
  return ["setting", "lr", "state_format", "length"].map((each) => (each === name ? "" : row[each])).join("|");
}

// Names of settings for people: the model's, with what tells it apart from others of that name.
function settingNames(rows) {
  const names = new Map();
  for (const [model, members] of groupBy(rows, (row) => row.model)) {
    const rates = new Set(members.map((row) => row.lr));
    const label = (row) => {
      const parts = [row.arm ?? model, row.state_format, rates.size > 1 && row.lr !== undefined && `lr ${row.lr}`];
      return parts.filter(Boolean).join(", ");
    };
    for (const [name, alike] of groupBy(members, label)) {
      const keys = [...new Set(alike.map(sameButSeed))];
      keys.forEach((key, place) => names.set(key, keys.length > 1 ? `${name} (${place + 1})` : name));
    }
  }
  return names;
}

function csvCell(value) {
  const text = value === undefined || value === null ? "" : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function csvText(columns, rows) {
  const lines = [columns, ...rows.map((row) => columns.map((name) => row[name]))];
  return lines.map((cells) => cells.map(csvCell).join(",") + "\n").join("");
}
