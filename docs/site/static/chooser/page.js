// The chooser: settings in, numbers out, and what is wrong said where it was typed.
(function (root) {
  "use strict";

  const { DEVICES, DEFAULTS, readers, fromFragment, toFragment, SettingError } = root.seqarch;
  const { Formulas, numbers, measuredOf, COLUMNS, fill, fillHead, element, bytesText, countText, draw } = root.seqarch;
  const at = (id) => document.getElementById(id);
  const tables = root.seqarchFormulas;
  const measured = root.seqarchMeasured || { arms: [], problems: ["What the studies have measured could not be read: this page shows computed numbers alone."] };
  const families = root.seqarchFamilies || [];
  const problems = [...measured.problems];
  if (!root.seqarchFamilies) problems.push("The list of published families could not be read: none are shown.");

  let texts = { ...DEFAULTS }; // of all fields, as typed
  let settings = {}; // the last valid value of each
  let sorted = { key: "held", down: false };
  let formulas = null;

  function begin() {
    if (!tables) {
      at("problem").textContent = "The formulas could not be read (chooser-formulas.js is damaged or missing): build the site again. Choosing a mixer has tables.";
      at("problem").hidden = false;
      for (const field of document.querySelectorAll("#chooser input, #chooser select")) field.disabled = true;
      return;
    }
    formulas = new Formulas(tables);
    DEVICES.bench[1] = tables.bench.bandwidth;
    DEVICES.bench[2] = tables.bench.arithmetic;
    options("width", tables.widths.map((width) => [String(width), String(width)]));
    options("channel", [...Object.keys(tables.channels), "none"].map((name) => [name, name]));
    options("device", Object.entries(DEVICES).map(([name, [title]]) => [name, title]));
    restore();
    root.addEventListener("hashchange", restore);
    at("chooser").addEventListener("input", (event) => typed(event.target));
    at("settings").addEventListener("submit", (event) => event.preventDefault());
    root.addEventListener("resize", () => plot());
    for (const event of ["pointerover", "focusin"]) at("rows").addEventListener(event, (given) => light(given.target.closest("tr")));
    at("rows").addEventListener("pointerleave", () => light(null));
  }

  function options(id, choices) {
    at(id).replaceChildren(...choices.map(([value, text]) => element("option", { value }, text)));
  }

  // All fields from the fragment of the address.
  function restore() {
    if (toFragment(texts) === root.location.hash && Object.keys(settings).length) return;
    texts = fromFragment(root.location.hash);
    for (const [name, value] of Object.entries(texts)) {
      if (at(name).type === "checkbox") at(name).checked = value === "yes";
      else at(name).value = value;
    }
    for (const name of Object.keys(texts)) read(name);
    show();
  }

  function typed(field) {
    if (!Object.hasOwn(DEFAULTS, field.name)) return;
    texts[field.name] = field.type === "checkbox" ? (field.checked ? "yes" : "") : field.value;
    if (field.name === "device" && field.value !== "own") {
      const [, bandwidth, arithmetic] = DEVICES[field.value];
      for (const [name, value] of Object.entries({ bandwidth, arithmetic })) {
        at(name).value = texts[name] = String(value);
        read(name);
      }
    }
    if (field.name === "bandwidth" || field.name === "arithmetic") at("device").value = texts.device = "own";
    read(field.name);
    root.history.replaceState(null, "", toFragment(texts) || root.location.pathname.split("/").at(-1) || "./");
    show();
  }

  // One field: its value where it can be read, else an error beside it and the value before.
  function read(name) {
    const [reader, place, text] = [readers(tables)[name], at(`${name}-error`), texts[name]];
    try {
      settings[name] = reader ? reader(text) : text;
      say(name, place, "");
    } catch (error) {
      if (!(error instanceof SettingError)) throw error;
      settings[name] = settings[name] ?? (reader ? reader(DEFAULTS[name]) : DEFAULTS[name]);
      say(name, place, error.message);
    }
  }

  function say(name, place, message) {
    if (!place) return;
    place.textContent = message;
    at(name).setAttribute("aria-invalid", message ? "true" : "false");
  }

  let own = null; // numbers of one's own pattern, as it was when it could last be read
  let rows = [];

  function show() {
    const said = numbers(formulas, settings.pattern, settings);
    if (!said.error) own = settings.pattern;
    const last = said.error && own ? numbers(formulas, own, settings) : said;
    const shownOwn = last.error ? null : last;
    const text = said.error && shownOwn ? `${said.error} Shown: ${own}` : said.error || "";
    say("pattern", at("pattern-error"), text);
    rows = Object.keys(tables.mixers).map((name) => numbers(formulas, name, settings));
    at("device-note").textContent = DEVICES[settings.device]?.[3] ?? "";
    answer(shownOwn);
    table(shownOwn);
    plot(shownOwn);
  }

  function answer(mine) {
    const fitting = rows.filter((row) => row.fits).sort(byKey({ key: "held" }));
    const tokens = settings.length.toLocaleString("en");
    const what = settings.counted === "all" ? "weights and a state" : "a state";
    const parts = [`At ${tokens} tokens ${fitting.length} of ${rows.length} mixers, in ${settings.depth} layers of width ${settings.width}, have ${what} within ${texts.memory}.`];
    if (mine) {
      const state = `${bytesText(mine.held)}: ${mine.fits ? "it fits" : "too much"}`;
      parts.push(` Yours, ${mine.pattern}, has ${state}.`);
    }
    const best = fitting
      .map((row) => [row.pattern, measuredOf(measured.arms, row.pattern).first])
      .filter(([, arm]) => arm)
      .sort((a, b) => b[1].mean - a[1].mean)
      .map(([name, arm]) => `${name} (${arm.mean.toFixed(3)})`);
    if (best.length) parts.push(` Of those that fit, the studies have measured the recall of ${best.join(", ")}.`);
    else if (fitting.length) parts.push(" Of those that fit the studies have measured none yet.");
    at("answer").textContent = parts.join("");
  }

  const byKey = ({ key, down }) => (a, b) => {
    if (a.error || b.error) return Boolean(a.error) - Boolean(b.error);
    const order = a[key] < b[key] ? -1 : a[key] > b[key] ? 1 : a.pattern < b.pattern ? -1 : 1;
    return down ? -order : order;
  };

  function sort(key) {
    sorted = { key, down: sorted.key === key && !sorted.down };
    show();
    const place = COLUMNS.findIndex(([name]) => name === key) + 1;
    at("rows").querySelector(`thead th:nth-child(${place}) button`).focus();
  }

  function table(mine) {
    fillHead(at("rows").tHead, sorted, sort);
    const shown = rows.filter((row) => settings.fitting !== "yes" || row.fits).sort(byKey(sorted));
    const body = document.createElement("tbody");
    if (mine) fill(body.insertRow(), mine, { measured, families, own: true });
    for (const row of shown) fill(body.insertRow(), row, { measured, families, own: false });
    at("rows").tBodies[0].replaceWith(body);
    at("notes").replaceChildren(...notes());
  }

  function notes() {
    const made = problems.map((problem) => element("p", { className: "chooser-error" }, problem));
    const arm = measured.arms[0];
    if (arm) {
      const chance = `guessing has ${arm.chance}`;
      const seen = `Measured recall: ${arm.task.toLowerCase()}, ${arm.length} tokens, models of ${arm.layers} layers of width ${arm.width}, of tuned learning rates; mean over seeds and its 95 % interval (${chance}). So small a task says which mixers can recall, not how well large ones do.`;
      made.push(element("p", { className: "note" }, seen));
    }
    return made;
  }

  const PLOTS = {
    state: ["stateBytes", "bytes of state", bytesText],
    step: ["stepFlops", "FLOPs of one more token", countText],
    flops: ["flops", "FLOPs of the whole sequence", countText],
  };
  let plotted = null; // one's own numbers, for a plot anew at another width of the window

  function plot(mine = plotted) {
    plotted = mine;
    const [method, title, yText] = PLOTS[settings.shown] ?? PLOTS.state;
    const last = Math.max(2 ** 20, 4 ** Math.ceil(Math.log2(Number(settings.length)) / 2));
    const xs = Array.from({ length: 2 * Math.log2(last / 64) + 1 }, (_, i) => Math.round(64 * 2 ** (i / 2)));
    const all = rows.filter((row) => !row.error).map((row) => ({ row, className: row.fits ? "fits" : "over" }));
    if (mine) all.push({ row: mine, className: "own" });
    const lines = all.map(({ row, className }) => ({
      label: row.pattern,
      className,
      points: xs.map((x) => [x, Math.max(1, Number(row.made[method](BigInt(x))))]),
    }));
    const values = lines.flatMap((line) => line.points.map(([, y]) => y));
    draw(at("plot"), {
      lines,
      xs: [64, last],
      ys: [Math.min(...values) / 1.5, Math.max(...values) * 1.5],
      xLabel: "tokens",
      yLabel: texts.memory,
      xText: (x) => (x >= 2 ** 20 ? `${x / 2 ** 20} Mi` : x >= 1024 ? `${x / 1024} Ki` : String(x)),
      yBase: settings.shown === "state" ? 16 : 10,
      yText,
      xMark: Math.max(64, Number(settings.length)),
      yMark: settings.shown === "state" && settings.counted === "state" ? settings.memory : 0,
      label: `${title} against tokens, a line for each mixer; the table has the numbers at ${settings.length} tokens`,
    });
    at("plot-note").textContent = `Each line is a mixer: solid where it fits at ${settings.length.toLocaleString("en")} tokens, dashed where not; the thick one is yours. Point at a line for its name, or at a row below for its line.`;
  }

  // The line of a row that is pointed at or has the focus.
  function light(row) {
    const name = row?.querySelector("th[data-pattern]")?.dataset.pattern;
    for (const line of at("plot").querySelectorAll(".line")) line.classList.toggle("lit", line.dataset.name === name);
  }

  begin();
  root.seqarch.state = () => ({ settings, texts, rows });
})(globalThis);
