// --- the text: parts are filled when they come near the window, and emptied when they leave ----------
const PART = 150;
const text = $("text"), main = document.querySelector("main");
let here = null, reached = -Infinity;
const near = new IntersectionObserver((entries) => {
  for (const entry of entries) (entry.isIntersecting ? fill : empty)(entry.target);
  // What lies between may have changed its height.
  if (performance.now() - reached < 500) reach();
}, { root: main, rootMargin: "600px" });
function drawText() {
  const doc = current(), parts = [];
  near.disconnect();
  here = null;
  // Until a part has been seen its height is guessed, so that the scroll bar is about right.
  const perLine = Math.max(20, text.clientWidth / 8);
  for (let start = 0; start < doc.tokens.length; start += PART) {
    const part = make("div", "part");
    let length = 0;
    for (const [word] of doc.tokens.slice(start, start + PART)) length += word.length;
    part.dataset.start = start;
    part.style.minHeight = 2 * Math.ceil(length / perLine) + "em";
    parts.push(part);
  }
  text.replaceChildren(...parts);
  parts.slice(0, 3).forEach(fill);
  parts.forEach((part) => near.observe(part));
  main.scrollTop = 0;
  drawColumns(doc);
  drawWorst(doc);
}
function fill(part) {
  if (part.firstChild) return;
  part.style.minHeight = "";
  const doc = current(), start = Number(part.dataset.start);
  for (const [word, row, special] of doc.tokens.slice(start, start + PART)) part.append(...token(doc, word, row, special));
}
function empty(part) {
  if (!part.firstChild || part.contains(here)) return;
  part.style.minHeight = part.offsetHeight + "px";
  part.replaceChildren();
}
// Blanks around a word are set outside of its colour, so that lines break as in any text.
function token(doc, word, row, special) {
  const [, before, bare, after] = /^(\s*)(.*?)(\s*)$/s.exec(word);
  const shown = bare || word.replaceAll("\n", "⏎").replaceAll(" ", "␣") || "∅";
  const element = make("span", "t" + (special ? " special" : bare ? "" : " blank"), shown.replaceAll("\n", "⏎\n"));
  if (special) element.title = "special token";
  if (row >= 0) {
    element.dataset.row = row;
    element.className += classes(doc, row);
    if (row === state.row) here = element;
  }
  // A sign in place of a blank is no place to break a line at; what follows it is.
  if (!bare) return [element, "\u200b" + "\n".repeat(word.split("\n").length - 1)];
  return [broken(before), element, broken(after)];
}
const broken = (blanks) => blanks.replaceAll("\n", "⏎\n");
function classes(doc, row) {
  return ` r ${shade(doc.rows[row])}${doc.rows[row].g?.length ? " flagged" : ""}`
    + (state.found?.get(state.document)?.has(row) ? " hit" : "") + (row === state.row ? " here" : "");
}
function recolour() {
  const doc = current();
  if (!doc) return;
  for (const element of text.querySelectorAll(".r"))
    element.className = element.className.replace(/ r .*/, "") + classes(doc, Number(element.dataset.row));
  drawWorst(doc);
}
function place(row) {
  const doc = current();
  if (!doc.places) {
    doc.places = new Map();
    doc.tokens.forEach(([, r], i) => { if (r >= 0) doc.places.set(r, i); });
  }
  const at = doc.places.get(row), part = text.children[Math.floor(at / PART)];
  if (!part) return null;
  fill(part);
  return part.children[at % PART];
}
function mark(row, scroll) {
  here?.classList.remove("here");
  here = row < 0 ? null : place(row);
  here?.classList.add("here");
  if (scroll && here) {
    reached = performance.now();
    reach();
  }
  const n = current().rows.length;
  $("at").hidden = row < 0;
  $("at").style.left = (100 * (row + 0.5)) / n + "%";
}
function reach() {
  if (!here) return;
  const box = here.getBoundingClientRect(), view = main.getBoundingClientRect();
  const top = $("top").getBoundingClientRect().bottom + 8;
  if (box.top < top || box.bottom > view.bottom - 24) main.scrollTop += box.top - (top + view.bottom) / 2;
}
function drawColumns(doc) {
  const held = $("columns");
  held.replaceChildren();
  for (const [name, value] of Object.entries(doc.columns ?? {}))
    held.append(make("dt", "", make("bdi", "", name)), " ", make("dd", "", make("bdi", "", value)));
}
function drawWorst(doc) {
  const held = $("worst"), worst = summary(doc).worst;
  held.replaceChildren();
  if (worst.length && doc.rows.length > worst.length) held.append(make("span", "", "lowest"), ...worst.map((row) =>
    button(shade(doc.rows[row]), make("bdi", "", `${doc.rows[row].t.trim() || "␣"}  ${told(doc.rows[row])}`), "", () => show(row, true))));
}
let pointer = "";
text.addEventListener("pointermove", (event) => {
  // Text that moves under a resting mouse is not pointed at.
  const at = `${event.screenX} ${event.screenY}`, row = event.target.closest?.(".r")?.dataset.row;
  if (event.pointerType === "touch" || at === pointer) return;
  pointer = at;
  if (!state.held && row !== undefined && Number(row) !== state.row) show(Number(row), false);
});
text.addEventListener("click", (event) => {
  const row = event.target.closest?.(".r")?.dataset.row;
  if (row === undefined || getSelection().type === "Range") return;
  state.held = !(state.held && Number(row) === state.row);
  show(Number(row), false);
});

// --- fidelity along the text ------------------------------------------------------------------------------
const spark = $("spark");
function drawSpark() {
  const rows = current()?.rows ?? [], canvas = spark.firstChild, scale = devicePixelRatio || 1;
  const width = (canvas.width = Math.round(spark.clientWidth * scale)), height = (canvas.height = Math.round(spark.clientHeight * scale));
  if (!width || !rows.length) return;
  const context = canvas.getContext("2d"), colour = palette(), n = Math.min(rows.length, width), lows = stretches(rows, n);
  const floor = lows.some((low) => low !== null && low < 0) ? -0.5 : 0;
  const y = (value) => 1 + (height - 2) * (1 - (Math.max(floor, value) - floor) / (1 - floor));
  lows.forEach((low, k) => {
    if (low === null) return;
    const [x, end] = [Math.floor((k * width) / n), Math.floor(((k + 1) * width) / n)];
    context.fillStyle = colour(shadeOf(low));
    context.fillRect(x, Math.min(y(low), y(0)), end - x, Math.abs(y(low) - y(0)));
    context.fillStyle = colour("faint");
    context.fillRect(x, y(low) - scale / 2, end - x, 1.5 * scale);
  });
  context.font = `${10 * scale}px system-ui, sans-serif`;
  for (const level of [0, 0.5]) {
    context.fillStyle = colour("line");
    context.fillRect(0, y(level), width, scale);
    context.fillStyle = colour("faint");
    context.fillText(String(level), 2 * scale, y(level) - 2 * scale);
  }
}
function sought(event) {
  const n = current().rows.length, box = spark.getBoundingClientRect();
  if (n) show(Math.max(0, Math.min(n - 1, Math.floor(((event.clientX - box.left) / box.width) * n))), true);
}
spark.addEventListener("pointerdown", (event) => { spark.setPointerCapture(event.pointerId); sought(event); });
spark.addEventListener("pointermove", (event) => { if (event.buttons) sought(event); });
function drawScale() {
  const bounds = ["< 0", ...STEPS.map(String)];
  $("scale").replaceChildren(...bounds.map((bound, i) => make("span", "f" + i, bound)));
  const [name, meaning] = MEASURES[state.measure];
  $("unit").textContent = meaning.split(":")[0];
  $("meaning").textContent = `${name}: ${meaning}. Each colour begins at the number in it. Dotted lines: a flag. Struck through: could not be explained.`;
}
