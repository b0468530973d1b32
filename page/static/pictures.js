"use strict";
// Pictures as they form: a film for one way of drawing, a row for each of several.

const FRAMES = 10; // pictures on the way, as in drawing.py

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
