// A plot with two logarithmic axes, as SVG: lines, one reference line for each axis, and what is marked.
(function (root) {
  "use strict";

  const SPACE = "http://www.w3.org/2000/svg";
  const MARGIN = { left: 62, right: 14, top: 12, bottom: 44 };

  function element(name, attributes, text) {
    const made = document.createElementNS(SPACE, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function ticks([low, high], base, most) {
    const first = Math.ceil(Math.log(low) / Math.log(base) - 1e-9);
    const last = Math.floor(Math.log(high) / Math.log(base) + 1e-9);
    const step = Math.max(1, Math.ceil((last - first) / most));
    const found = [];
    for (let power = first; power <= last; power += step) found.push(base ** power);
    return found;
  }

  // lines: [{ label, points: [[x, y], ...], className, title }], the last drawn on top.
  function draw(holder, { lines, xs, ys, xLabel, yLabel, xText, yText, yBase, xMark, yMark, label }) {
    const width = Math.max(280, holder.clientWidth);
    const height = Math.max(260, Math.min(420, width * 0.62));
    const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label });
    const scale = ([low, high], from, to) => (value) =>
      from + ((Math.log(value) - Math.log(low)) / (Math.log(high) - Math.log(low))) * (to - from);
    const x = scale(xs, MARGIN.left, width - MARGIN.right);
    const y = scale(ys, height - MARGIN.bottom, MARGIN.top);
    for (const tick of ticks(ys, yBase, 8)) {
      svg.append(element("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(tick), y2: y(tick) }));
      svg.append(element("text", { class: "tick", x: MARGIN.left - 6, y: y(tick) + 4, "text-anchor": "end" }, yText(tick)));
    }
    for (const tick of ticks(xs, 4, width / 70)) {
      svg.append(element("line", { class: "grid", x1: x(tick), x2: x(tick), y1: MARGIN.top, y2: height - MARGIN.bottom }));
      svg.append(element("text", { class: "tick", x: x(tick), y: height - MARGIN.bottom + 18, "text-anchor": "middle" }, xText(tick)));
    }
    svg.append(element("text", { class: "axis", x: (MARGIN.left + width - MARGIN.right) / 2, y: height - 6, "text-anchor": "middle" }, xLabel));
    if (yMark >= ys[0] && yMark <= ys[1]) {
      svg.append(element("line", { class: "mark", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(yMark), y2: y(yMark) }));
      svg.append(element("text", { class: "axis mark-text", x: MARGIN.left + 6, y: y(yMark) - 6 }, yLabel));
    }
    svg.append(element("line", { class: "mark", x1: x(xMark), x2: x(xMark), y1: MARGIN.top, y2: height - MARGIN.bottom }));
    for (const line of lines) {
      const points = line.points.map(([at, value]) => `${x(at).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
      const drawn = element("polyline", { class: `line ${line.className}`, points, "data-name": line.label });
      drawn.append(element("title", {}, line.label));
      svg.append(drawn);
    }
    holder.replaceChildren(svg);
  }

  root.seqarch = Object.assign(root.seqarch || {}, { draw });
})(globalThis);
