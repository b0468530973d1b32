"use strict";
// Levels over time: the axis with its edges, and a card for each level with its patch grid.

const SVG = "http://www.w3.org/2000/svg";
const NUDGE = 0.01; // of an edge, by an arrow key

function svg(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function patchGrid(level) {
  const [height, width] = about.input_size;
  const [rows, columns] = about.levels[level].patch;
  const side = Math.max(height, width);
  const picture = svg("svg", { viewBox: `-0.5 -0.5 ${76} ${76}`, role: "img" });
  const scale = 75 / side;
  picture.append(svg("title", {}));
  picture.firstChild.textContent = `${rows}x${columns} patches of a ${height}x${width} input`;
  picture.append(svg("rect", { width: width * scale, height: height * scale, fill: colour(level), "fill-opacity": 0.25 }));
  const line = (x1, y1, x2, y2) =>
    svg("line", { x1: x1 * scale, y1: y1 * scale, x2: x2 * scale, y2: y2 * scale, stroke: colour(level), "stroke-width": 1 });
  for (let x = 0; x <= width; x += columns) picture.append(line(x, 0, x, height));
  for (let y = 0; y <= height; y += rows) picture.append(line(0, y, width, y));
  return picture;
}

function makeCards() {
  $("cards").replaceChildren(
    ...about.levels.map((each, level) => {
      const scale = make("input", { type: "number", step: "0.1", value: scales[level], id: `scale-${level}` });
      scale.addEventListener("input", () => {
        scales[level] = scale.value;
        changed();
      });
      const card = make(
        "div",
        { className: "card" },
        patchGrid(level),
        make("b", { textContent: `${each.patch.join("x")} patches` }),
        make("span", { textContent: `${each.tokens} tokens, ${gmacs(each.gmacs)} GMACs` }),
        make("label", {}, "guidance ", scale),
        make("span", { className: "spent", id: `spent-${level}` }),
      );
      card.style.borderLeftColor = colour(level);
      return card;
    }),
  );
}

function makeHandles() {
  $("handles").replaceChildren(
    ...edges.map((_, index) => {
      const fixed = about.fixed.includes(index);
      const handle = make("div", { className: fixed ? "handle fixed" : "handle", id: `edge-${index}`, tabIndex: 0 }, make("output"));
      handle.setAttribute("role", "slider");
      handle.setAttribute("aria-label", `time at which level ${index + 1} begins`);
      handle.title = fixed ? "another expert takes over here" : "drag, or arrow keys; double-click for the network's own";
      if (!fixed) letMove(handle, index);
      return handle;
    }),
  );
  $("ticks").replaceChildren(
    ...[["t = 0, noise", 0], ["0.25", 0.25], ["0.5", 0.5], ["0.75", 0.75], ["t = 1, data", 1]].map(([text, t]) => {
      const tick = make("span", { textContent: text });
      tick.style.left = percent(t);
      return tick;
    }),
  );
}

function moveEdge(index, t) {
  const gap = about.elastic ? 0 : NUDGE;
  const low = (index ? edges[index - 1] : 0) + gap;
  const high = (index + 1 < edges.length ? edges[index + 1] : 1) - gap;
  edges[index] = Math.round(Math.min(Math.max(t, low), high) * 1e4) / 1e4;
  showAxis();
  changed();
}

function letMove(handle, index) {
  const at = (event) => {
    const box = $("axis").getBoundingClientRect();
    return Math.round((event.clientX - box.left) / box.width / NUDGE) * NUDGE;
  };
  handle.addEventListener("pointerdown", (event) => {
    handle.setPointerCapture(event.pointerId);
    handle.focus();
    event.preventDefault();
  });
  handle.addEventListener("pointermove", (event) => handle.hasPointerCapture(event.pointerId) && moveEdge(index, at(event)));
  handle.addEventListener("dblclick", () => moveEdge(index, about.edges[index]));
  handle.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10 }[event.key];
    if (!step) return;
    event.preventDefault();
    moveEdge(index, edges[index] + step * NUDGE);
  });
}

function showAxis() {
  const ends = [0, ...edges, 1];
  $("segments").replaceChildren(
    ...about.levels.map((each, level) => {
      const segment = make("div", { className: "segment" }, make("span", {}, make("b", { textContent: each.patch.join("x") })));
      const length = Math.max(0, ends[level + 1] - ends[level]);
      segment.style.left = percent(ends[level]);
      segment.style.width = percent(length);
      segment.style.backgroundColor = `color-mix(in srgb, ${colour(level)} 35%, white)`;
      const [rows, columns] = each.patch.map((side) => (side * 40) / Math.max(...about.levels[0].patch) / 2);
      const stroke = (direction) => `linear-gradient(${direction}, ${colour(level)} 1px, transparent 1px)`;
      segment.style.backgroundImage = `${stroke("to right")}, ${stroke("to bottom")}`;
      segment.style.backgroundSize = `${columns}px ${rows}px`;
      segment.firstChild.hidden = length < 0.06;
      return segment;
    }),
  );
  edges.forEach((edge, index) => {
    const handle = $(`edge-${index}`);
    handle.style.left = percent(edge);
    handle.firstChild.textContent = edge.toFixed(2);
    for (const [name, value] of [["now", edge], ["min", ends[index]], ["max", ends[index + 2]]]) handle.setAttribute(`aria-value${name}`, short(value));
  });
}
