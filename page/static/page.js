"use strict";
// The page: its form, what a setting costs, and drawing. It asks two questions: /plan, what a setting means and costs,
// whenever it changes; and /draw. All numbers of the process are the server's; here they are shown.

const LEVEL_COLOURS = ["#e0a458", "#5b9aa0", "#3d5a80", "#7d5ba6", "#b56576", "#6a994e", "#8d99ae"];
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
  $("budgets").value = settings.budgets.join(", ");
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
    scales: scales.map((scale) => scale || "nothing").join(","),
    ...(about.edges.length ? { edges: edges.join(",") } : {}),
    show: document.querySelector("[name=show]:checked").value,
    budgets: $("budgets").value,
  };
  return new URLSearchParams(pairs).toString();
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
    const text = `The pyramid takes ${(rows[1].gmacs / rows[0].gmacs).toFixed(2)}x less arithmetic than this network's finest level all the way, which is what SiT takes.`;
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

function show(event, state) {
  if (event.kind === "error") throw new Error(event.error);
  if (event.kind === "end") return;
  if (event.kind === "way") {
    $("result").querySelector(".waiting")?.remove();
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
  $("result").replaceChildren(make("p", { className: "waiting", textContent: "Waiting for the first evaluation." }));
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
    $("result").querySelector(".waiting")?.remove();
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
