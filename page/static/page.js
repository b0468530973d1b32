"use strict";
// The page asks two questions: /plan, what a setting means and costs, whenever it changes; and /draw. All numbers of the
// process are the server's; here they are shown.

const LEVEL_COLOURS = ["#e0a458", "#5b9aa0", "#3d5a80", "#7d5ba6", "#b56576", "#6a994e", "#8d99ae"];
const SVG = "http://www.w3.org/2000/svg";
const FRAMES = 10; // pictures on the way, as in drawing.py
const NUDGE = 0.01; // of an edge, by an arrow key
const $ = (id) => document.getElementById(id);

let about; // the network
let plan; // of the setting on the page
let edges = [];
let scales = [];
let drawing = null; // AbortController of the drawing under way
let shown = null; // which of link, command and python

// -- Small things ---------------------------------------------------------------------------------------------------

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function svg(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

const short = (number) => String(Math.round(number * 1e4) / 1e4);
const percent = (number) => `${100 * number}%`;
const colour = (level) => LEVEL_COLOURS[level % LEVEL_COLOURS.length];
const gmacs = (number) => (number >= 100 ? number.toFixed(0) : number.toPrecision(3));
const seconds = (number) => (number < 10 ? number.toFixed(2) : number.toFixed(1));

function say(message) {
  $("error").hidden = !message;
  $("error").textContent = message || "";
}

// -- The form -------------------------------------------------------------------------------------------------------

function fillChoices() {
  document.title = `PPFlow: ${about.name}`;
  $("network").textContent = `${about.name}, ${about.trained}, from ${about.source}, on ${about.device}`;
  $("classes-hint").textContent = `0 to ${about.classes - 1}, one for each picture`;
  $("size-field").hidden = !about.any_size;
  for (const [mode, methods] of Object.entries(about.methods)) {
    const group = make("optgroup", { label: mode });
    for (const method of methods) group.append(make("option", { value: `${mode} ${method}`, textContent: `${mode} ${method}` }));
    $("method").append(group);
  }
  if (!about.elastic) $("shows").querySelector("[value=budgets]").parentElement.classList.add("off");
}

function fillForm(settings) {
  $("classes").value = settings.classes.join(", ");
  $("seed").value = settings.seed;
  $("size").value = settings.size ? settings.size.join("x") : "";
  $("method").value = `${settings.mode} ${settings.method}`;
  $("steps").value = settings.steps.join(", ");
  $("budgets").value = settings.budgets.map(short).join(", ");
  document.querySelector(`[name=show][value=${settings.show}]`).checked = true;
  edges = [...(settings.edges ?? about.edges)];
  scales = about.levels.map((_, level) => String(settings.scales[settings.scales.length > 1 ? level : 0]));
}

function query() {
  const [mode, method] = $("method").value.split(" ");
  const pairs = {
    classes: $("classes").value,
    seed: $("seed").value,
    ...(about.any_size ? { size: $("size").value } : {}),
    mode,
    method,
    steps: $("steps").value,
    scales: scales.join(","),
    ...(about.edges.length ? { edges: edges.map(short).join(",") } : {}),
    show: document.querySelector("[name=show]:checked").value,
    budgets: $("budgets").value,
  };
  return new URLSearchParams(pairs).toString();
}

// -- Levels over time ------------------------------------------------------------------------------------------------

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

// -- What it costs ---------------------------------------------------------------------------------------------------

function showPlan() {
  $("untrained").replaceChildren(
    ...plan.not_trained.map(([, start, stop]) => {
      const piece = make("i");
      piece.style.left = percent(start);
      piece.style.width = percent(stop - start);
      return piece;
    }),
  );
  const where = plan.not_trained.map(([level, start, stop]) => `${about.levels[level].patch.join("x")} patches for t from ${short(start)} to ${short(stop)}`);
  const notes = [];
  if (where.length) notes.push(`Training did not show this network ${where.join(", nor ")}: only train.py --elastic trains levels for other edges.`);
  if (plan.finest_from) notes.push(`Training showed the finest level times from ${short(plan.finest_from)} on alone, so its pictures from noise say little; its costs are SiT's. Train with --elastic, and both can be compared.`);
  $("notes").hidden = !notes.length;
  $("notes").textContent = notes.join(" ");
  about.levels.forEach((_, level) => {
    const cost = plan.pyramid;
    const unused = cost && !cost.evaluations[level];
    $(`spent-${level}`).textContent = cost ? `${cost.evaluations[level]} evaluations, ${gmacs(cost.level_gmacs[level])} GMACs` : "";
    $(`spent-${level}`).closest(".card").classList.toggle("unused", Boolean(unused));
  });
  const rows = plan.pyramid ? [{ name: "pyramid", ...plan.pyramid }] : [];
  if (plan.finest) rows.push(finestRow());
  showCosts(rows);
  showCode();
}

const finestRow = () => ({ name: "finest level alone (SiT)", ...plan.finest });

// Bars of GMACs, the parts of each level in its colour. Rows: {name, level_gmacs, gmacs, nfe, seconds}
function showCosts(rows) {
  const heads = ["", "", "GMACs per picture", "evaluations", "seconds, all pictures"];
  if (!rows.length) {
    const why = plan.settings.show === "budgets" ? "Budgets are turned into edges, and counted, when they are drawn." : "This solver chooses its own steps: they are counted when it draws.";
    $("costs").replaceChildren(make("span", { className: "head", textContent: why }));
    return;
  }
  const most = Math.max(...rows.map((row) => row.gmacs));
  const table = make("div", { className: "bars" });
  table.style.gridTemplateColumns = "max-content 1fr repeat(3, max-content)";
  table.append(...heads.map((textContent) => make("span", { className: "head number", textContent })));
  for (const row of rows) {
    const bar = make("span", { className: "bar" });
    row.level_gmacs.forEach((part, level) => {
      const piece = make("i");
      piece.style.width = percent(part / most);
      piece.style.background = colour(level);
      bar.append(piece);
    });
    const numbers = [gmacs(row.gmacs), short(row.nfe), row.seconds ?? "–"];
    table.append(make("span", { textContent: row.name }), bar, ...numbers.map((textContent) => make("span", { className: "number", textContent })));
  }
  $("costs").replaceChildren(table);
  if (rows.length === 2 && rows[0].name === "pyramid") {
    const text = `The pyramid takes ${(rows[1].gmacs / rows[0].gmacs).toFixed(2)}x less arithmetic than this network's finest level all the way, which is SiT's.`;
    $("costs").append(make("p", { className: "saves", textContent: text }));
  }
}

let asked = 0;
let timer;

function changed() {
  clearTimeout(timer);
  timer = setTimeout(() => ask(query()), 120);
}

// Ask what a setting means; true if it can be drawn.
async function ask(text, fill = false) {
  const number = ++asked;
  const response = await fetch(`plan?${text}`).catch(() => null);
  if (number !== asked) return false; // a later question is under way
  if (!response) return say("app.py does not answer: is it still running?"), false;
  const answer = await response.json();
  if (answer.error) return say(answer.error), false;
  say("");
  plan = answer;
  if (fill) {
    fillForm(plan.settings);
    makeCards();
    makeHandles();
    showAxis();
  }
  showPlan();
  return true;
}

// -- Drawing ---------------------------------------------------------------------------------------------------------

function picture(url, level, isDone) {
  const figure = make("figure", { className: isDone ? "done" : "" }, make("img", { src: url, alt: "" }));
  const [height, width] = plan.settings.size ? plan.settings.size.map((side) => side / about.factor) : about.input_size;
  figure.classList.toggle("smooth", height * about.factor > 64);
  figure.style.setProperty("--rows", height / about.levels[level].patch[0]);
  figure.style.setProperty("--columns", width / about.levels[level].patch[1]);
  figure.style.setProperty("--grid", colour(level));
  return figure;
}

function makeWay(event, classes) {
  const track = make("div", { className: "track" });
  const pieces = () =>
    event.spans.map(([level, start, stop]) => {
      const piece = make("i");
      piece.style.left = percent(start);
      piece.style.width = percent(stop - start);
      piece.style.background = colour(level);
      return piece;
    });
  const done = make("b", {}, ...pieces());
  track.append(...pieces(), done);
  const facts = make("span");
  const body = make("div");
  const section = make("div", { className: "way" }, make("h3", {}, event.name, facts), track, body);
  $("result").append(section);
  const way = { ...event, body, facts, frames: 0 };
  way.advance = (t) => {
    const width = track.clientWidth;
    done.style.width = percent(t);
    for (const piece of done.children) {
      const [, start, stop] = way.spans[[...done.children].indexOf(piece)];
      piece.style.left = `${start * width}px`;
      piece.style.width = `${(stop - start) * width}px`;
    }
  };
  if (event.ways === 1) makeFilm(way, classes);
  else body.className = "row";
  way.advance(0);
  return way;
}

// One row for each class, one column for each picture on the way, and the finished one.
function makeFilm(way, classes) {
  way.body.className = "film";
  setColumns(way, FRAMES);
  way.heads = Array.from({ length: FRAMES + 1 }, (_, frame) => make("span", { className: "time", textContent: frame < FRAMES ? " " : "picture" }));
  way.cells = classes.map(() => Array.from({ length: FRAMES + 1 }, () => make("div", { className: "empty" })));
  way.body.append(make("span"), ...way.heads);
  classes.forEach((label, row) => way.body.append(make("span", { className: "class", textContent: label }), ...way.cells[row]));
}

function setColumns(way, count) {
  way.body.style.gridTemplateColumns = `max-content repeat(${count}, minmax(0, 1fr)) minmax(0, 1.45fr)`;
}

// Where there were fewer steps than columns.
function dropColumns(way) {
  for (const row of [way.heads, ...way.cells]) row.splice(way.frames, FRAMES - way.frames).forEach((cell) => cell.remove());
  setColumns(way, Math.max(way.frames, 6));
}

function showPictures(way, pictures, level, isDone, t) {
  const figures = pictures.map((url) => picture(url, level, isDone));
  if (!way.cells) return way.body.replaceChildren(...figures);
  const last = way.heads.length - 1;
  if (!isDone && way.frames === last) return;
  const column = isDone ? last : way.frames++;
  if (!isDone) {
    way.heads[column].textContent = `t = ${t.toFixed(2)}`;
    way.heads[column].style.borderBottomColor = colour(level);
  }
  figures.forEach((figure, row) => {
    way.cells[row][column].replaceWith(figure);
    way.cells[row][column] = figure;
  });
}

function show(event, state) {
  if (event.kind === "error") throw new Error(event.error);
  if (event.kind === "end") return;
  if (event.kind === "way") {
    state.ways[event.way] = makeWay(event, state.settings.classes);
    return;
  }
  const way = state.ways[event.way];
  if (event.kind === "step") {
    way.advance(event.t);
    way.facts.textContent = `t = ${event.t.toFixed(2)}, ${about.levels[event.level].patch.join("x")} patches`;
    if (event.pictures) showPictures(way, event.pictures, event.level, false, event.t);
    return;
  }
  way.advance(1);
  if (way.cells) dropColumns(way);
  showPictures(way, event.pictures, about.levels.length - 1, true);
  const cost = event.cost;
  const starts = way.spans.slice(1).map(([, start]) => short(start));
  way.facts.textContent = `${gmacs(cost.gmacs)} GMACs, ${seconds(cost.seconds)} s${starts.length && way.ways > 1 ? `, edge at ${starts.join(", ")}` : ""}`;
  state.rows[event.way] = { name: way.name, ...cost, seconds: seconds(cost.seconds) };
  const rows = [...state.rows];
  if (way.ways === 1 && plan.finest) rows.push({ ...finestRow(), seconds: event.finest_seconds ? `about ${seconds(event.finest_seconds)}` : undefined });
  showCosts(rows);
}

async function draw() {
  clearTimeout(timer);
  const text = query();
  if (!(await ask(text))) return;
  history.replaceState(null, "", `?${plan.query}`);
  drawing = new AbortController();
  const state = { settings: plan.settings, ways: [], rows: [] };
  $("result").replaceChildren();
  $("result").className = plan.settings.show === "finest" ? "sides" : "";
  $("draw").disabled = true;
  $("cancel").hidden = false;
  try {
    const response = await fetch(`draw?${plan.query}`, { signal: drawing.signal });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      const lines = (rest + part.value).split("\n");
      rest = lines.pop();
      for (const line of lines) show(JSON.parse(line), state);
    }
  } catch (error) {
    say(error.name === "AbortError" ? "Cancelled." : error.message);
  }
  drawing = null;
  $("draw").disabled = false;
  $("cancel").hidden = true;
}

// -- The same elsewhere ----------------------------------------------------------------------------------------------

function showCode() {
  $("code").hidden = !shown;
  for (const button of document.querySelectorAll("[data-shows]")) button.classList.toggle("chosen", button.dataset.shows === shown);
  if (!shown) return;
  const link = `${location.origin}/?${plan.query}`;
  const text = { link, command: plan.command, python: plan.python }[shown];
  const copy = make("button", { type: "button", textContent: "copy" });
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    copy.textContent = "copied";
  });
  $("code").replaceChildren(shown === "link" ? make("a", { href: link, textContent: text }) : text, copy);
}

// -- Begin -----------------------------------------------------------------------------------------------------------

async function begin() {
  about = await (await fetch("about")).json();
  fillChoices();
  await ask("", true);
  if (location.search.length > 1) await ask(location.search.slice(1), true);
  $("settings").addEventListener("input", changed);
  $("settings").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!drawing) draw();
  });
  $("another").addEventListener("click", () => {
    $("seed").value = Math.floor(Math.random() * 1e6);
    changed();
  });
  $("cancel").addEventListener("click", () => drawing?.abort());
  for (const button of document.querySelectorAll("[data-shows]")) {
    button.addEventListener("click", () => {
      shown = shown === button.dataset.shows ? null : button.dataset.shows;
      showCode();
    });
  }
  const grids = () => document.body.classList.toggle("grids", $("grids").checked);
  $("grids").addEventListener("change", grids);
  grids();
  document.body.dataset.ready = "yes";
}

begin();
