// The table of the chooser: a row for one's own pattern and for each mixer, with what is computed and what is measured.
(function (root) {
  "use strict";

  const { SettingError, PatternError, model } = root.seqarch;

  function scaled(number, units) {
    let value = Number(number);
    let at = 0;
    while (value >= units.step && at < units.names.length - 1) {
      value /= units.step;
      at += 1;
    }
    const text = value >= 100 || Number.isInteger(value) ? Math.round(value).toLocaleString("en") : value.toPrecision(3);
    return `${text} ${units.names[at]}`.trim();
  }

  const bytesText = (number) => scaled(number, { step: 1024, names: ["B", "KiB", "MiB", "GiB", "TiB", "PiB"] });
  const countText = (number) => scaled(number, { step: 1000, names: ["", "k", "M", "G", "T", "P", "E"] });

  function timeText(seconds) {
    if (seconds < 1e-3) return `${(seconds * 1e6).toPrecision(3)} µs`;
    return seconds < 1 ? `${(seconds * 1e3).toPrecision(3)} ms` : `${seconds.toPrecision(3)} s`;
  }

  const itemSize = (dtype) => (dtype === "bfloat16" ? 2 : 4);

  // The numbers of one pattern at these settings; { error } in the library's words where it cannot be.
  function numbers(formulas, pattern, settings) {
    try {
      const made = model(formulas, pattern, settings);
      const state = made.stateBytes(settings.length);
      const step = made.stepFlops(settings.length);
      const weights = made.parameters * BigInt(itemSize(settings.dtype));
      const held = settings.counted === "all" ? state + weights : state;
      const read = Number(made.read) * itemSize(settings.dtype) + Number(made.stateRead(settings.length));
      const seconds = Math.max(read / (settings.bandwidth * 1e9), Number(step) / (settings.arithmetic * 1e9));
      return { pattern, made, parameters: made.parameters, state, step, held, seconds, fits: Number(held) <= settings.memory };
    } catch (error) {
      if (error instanceof SettingError || error instanceof PatternError) return { pattern, error: error.message };
      throw error;
    }
  }

  // The arm that began by default, and the others, of what was measured with this mixer alone.
  function measuredOf(arms, pattern) {
    const own = arms.filter((arm) => arm.pattern === pattern);
    const plain = own.find((arm) => !arm.slow_gates && arm.embedding_std === 0.02);
    return { first: plain || own[0], all: own };
  }

  // Families of published models by how alike the shares of their mixers are: the cosine, from .8 on.
  function alike(families, layers) {
    const shares = {};
    for (const { mixers, count } of layers) {
      for (const { name } of mixers) shares[name] = (shares[name] || 0) + Number(count);
    }
    const norm = (counts) => Math.sqrt(Object.values(counts).reduce((sum, count) => sum + count * count, 0));
    return families
      .map((family) => {
        const common = Object.entries(family.mixers).reduce((sum, [name, count]) => sum + count * (shares[name] || 0), 0);
        return { family, cosine: common / (norm(family.mixers) * norm(shares)) };
      })
      .filter(({ cosine }) => cosine >= 0.8)
      .sort((a, b) => b.cosine - a.cosine)
      .map(({ family }) => family);
  }

  const COLUMNS = [
    ["pattern", "Mixer in every layer"],
    ["held", "Memory"],
    ["seconds", "Least time of a token"],
    ["step", "FLOPs of a token"],
    ["recall", "Measured recall"],
    ["parameters", "Parameters"],
    ["alike", "Published families alike"],
  ];
  const NOT_SORTED = ["recall", "alike"];

  function cell(row, content, className) {
    const made = row.insertCell();
    made.append(...[content].flat());
    if (className) made.className = className;
    return made;
  }

  function element(name, attributes, ...content) {
    const made = Object.assign(document.createElement(name), attributes);
    made.append(...content);
    return made;
  }

  function fill(row, found, { measured, families, own }) {
    row.className = own ? "own" : "";
    const name = element("code", {}, found.pattern);
    const title = own ? [name, element("span", { className: "badge" }, "yours")] : [element("a", { href: `mixers/${found.pattern}.html` }, name)];
    const head = row.appendChild(element("th", { scope: "row" }, ...title));
    head.dataset.pattern = found.pattern;
    if (found.error) {
      const message = cell(row, found.error, "refused");
      message.colSpan = COLUMNS.length - 1;
      return;
    }
    const size = [bytesText(found.held), element("span", { className: found.fits ? "fits" : "over" }, found.fits ? "fits" : "too much")];
    cell(row, size, "number").dataset.exact = found.held;
    cell(row, timeText(found.seconds), "number");
    cell(row, countText(found.step), "number").dataset.exact = found.step;
    cell(row, recallCell(measuredOf(measured.arms, found.pattern)), "number");
    cell(row, countText(found.parameters), "number").dataset.exact = found.parameters;
    cell(row, familiesCell(alike(families, found.made.layers)));
  }

  function recallCell({ first }) {
    if (!first) return element("span", { className: "none" }, "not yet");
    const digits = (number) => number.toFixed(3);
    const range = `${digits(first.low)} to ${digits(first.high)}, ${first.seeds.length} seeds`;
    const mean = element("a", { href: `results/${first.page}.html`, title: first.arm }, digits(first.mean));
    return [mean, element("span", { className: "range" }, range)];
  }

  function familiesCell(found) {
    if (!found.length) return element("span", { className: "none" }, "none");
    const names = found.map((family) => family.name).join(", ");
    if (found.length <= 3) return names;
    const rest = element("details", {}, element("summary", {}, `${found[0].name} and ${found.length - 1} more`), names);
    return rest;
  }

  // The heading, whose buttons sort.
  function fillHead(head, sorted, sort) {
    const row = element("tr", {});
    for (const [key, title] of COLUMNS) {
      const th = element("th", { scope: "col" });
      if (NOT_SORTED.includes(key)) {
        th.append(title);
      } else {
        const button = element("button", { type: "button" }, title);
        button.addEventListener("click", () => sort(key));
        th.append(button);
        th.setAttribute("aria-sort", sorted.key === key ? (sorted.down ? "descending" : "ascending") : "none");
      }
      row.append(th);
    }
    head.replaceChildren(row);
  }

  root.seqarch = Object.assign(root.seqarch, { numbers, measuredOf, alike, COLUMNS, fill, fillHead, element, bytesText, countText, timeText });
})(globalThis);
