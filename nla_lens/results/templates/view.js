"use strict";
// Everything shown goes in by textContent: what models and strangers wrote is never parsed as HTML.
const DATA = JSON.parse(document.getElementById("data").textContent);
const documents = DATA.documents;
const PART = 150, ROW_HEIGHT = 56;
const $ = (id) => document.getElementById(id);
const make = (tag, className, text) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
};
const state = { document: -1, row: -1, query: "", hits: [], hit: -1 };

// --- scores ---------------------------------------------------------------------------------------
const score = (row) => (row.f ?? row.c ?? null);
function shade(row) {
  if (row.e) return "none failed";
  const value = score(row);
  if (value === null) return "none";
  const steps = [0, 0.25, 0.5, 0.65, 0.8, 0.92];
  return "f" + steps.filter((step) => value >= step).length;
}
const number = (value) => (value === null || value === undefined ? "–" : value.toFixed(3));

// --- documents ------------------------------------------------------------------------------------
function worst(doc) {
  doc.worst ??= doc.rows.map((row, i) => [row.e ? -Infinity : score(row), i]).filter(([s]) => s !== null)
    .sort((a, b) => a[0] - b[0]).slice(0, 5).map(([, i]) => i);
  return doc.worst;
}
function mean(doc) {
  if (doc.mean === undefined) {
    const scores = doc.rows.filter((row) => !row.e).map(score).filter((s) => s !== null);
    doc.mean = scores.length ? scores.reduce((a, b) => a + b, 0) / scores.length : null;
  }
  return doc.mean;
}
const list = document.querySelector("nav"), space = make("div", "space");
list.append(space);
function drawList() {
  space.style.height = documents.length * ROW_HEIGHT + "px";
  const first = Math.max(0, Math.floor(list.scrollTop / ROW_HEIGHT) - 2);
  const last = Math.min(documents.length, first + Math.ceil(list.clientHeight / ROW_HEIGHT) + 5);
  space.replaceChildren(...documents.slice(first, last).map((doc, k) => {
    const button = make("button"), i = first + k;
    button.style.top = i * ROW_HEIGHT + "px";
    button.append(make("b", "", doc.name));
    const low = worst(doc)[0], lowest = low === undefined ? "" : " · lowest " + (doc.rows[low].e ? "failed" : number(score(doc.rows[low])));
    button.append(make("small", "", doc.rows.length + " rows · mean " + number(mean(doc)) + lowest));
    button.setAttribute("aria-current", String(i === state.document));
    button.addEventListener("click", () => openDocument(i));
    return button;
  }));
}
list.addEventListener("scroll", drawList, { passive: true });

// --- the text: parts are filled when they come near the window, and emptied when they leave ----------
const text = $("text"), main = document.querySelector("main");
const near = new IntersectionObserver((entries) => {
  for (const entry of entries) (entry.isIntersecting ? fill : empty)(entry.target);
}, { root: main, rootMargin: "600px" });
function fill(part) {
  if (part.firstChild) return;
  part.style.minHeight = "";
  const doc = documents[state.document], start = Number(part.dataset.start);
  part.append(...doc.tokens.slice(start, start + PART).map(([word, row, special]) => token(doc, word, row, special)));
}
function empty(part) {
  if (!part.firstChild) return;
  part.style.minHeight = part.offsetHeight + "px";
  part.replaceChildren();
}
function token(doc, word, row, special) {
  const element = make("span", "t" + (special ? " special" : ""), word.replaceAll("\n", "⏎\n"));
  if (row < 0) return element;
  element.className += " r " + shade(doc.rows[row]);
  if (state.hitSet?.has(row)) element.classList.add("hit");
  if (row === state.row) element.classList.add("here");
  element.dataset.row = row;
  return element;
}
function openDocument(i, row) {
  if (i < 0 || i >= documents.length) return;
  if (i !== state.document) {
    state.document = i;
    near.disconnect();
    const doc = documents[i], parts = [];
    state.hitSet = hitsOf(i);
    for (let start = 0; start < doc.tokens.length; start += PART) {
      const part = make("div", "part");
      part.dataset.start = start;
      part.style.minHeight = "4em";
      parts.push(part);
    }
    text.replaceChildren(...parts);
    parts.slice(0, 3).forEach(fill);
    parts.forEach((part) => near.observe(part));
    main.scrollTop = 0;
    columns(doc);
    drawWorst(doc);
    list.scrollTop = Math.max(0, Math.min(list.scrollTop, i * ROW_HEIGHT));
    if ((i + 1) * ROW_HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = (i + 1) * ROW_HEIGHT - list.clientHeight;
    drawList();
    state.row = -1;
  }
  show(row ?? (documents[i].rows.length ? 0 : -1), row !== undefined);
}
function columns(doc) {
  const held = $("columns");
  held.replaceChildren();
  for (const [name, value] of Object.entries(doc.columns ?? {})) held.append(make("dt", "", name), make("dd", "", String(value)));
}
function drawWorst(doc) {
  const held = $("worst");
  held.replaceChildren(make("span", "", "lowest:"));
  for (const row of worst(doc)) {
    const button = make("button", shade(doc.rows[row]), (doc.rows[row].t ?? "") + "  " + (doc.rows[row].e ? "failed" : number(score(doc.rows[row]))));
    button.addEventListener("click", () => show(row, true));
    held.append(button);
  }
}

// --- one explanation ----------------------------------------------------------------------------------
function place(row) {
  const doc = documents[state.document];
  if (!doc.places) {
    doc.places = new Map();
    doc.tokens.forEach(([, r], i) => { if (r >= 0) doc.places.set(r, i); });
  }
  const at = doc.places.get(row);
  if (at === undefined) return null;
  const part = text.children[Math.floor(at / PART)];
  fill(part);
  return part.children[at % PART];
}
function show(row, scroll) {
  const doc = documents[state.document];
  document.querySelectorAll(".here").forEach((e) => e.classList.remove("here"));
  state.row = row;
  if (row < 0) { $("said").replaceChildren(make("p", "hint", "Nothing was explained in this text.")); return; }
  const element = place(row);
  element?.classList.add("here");
  if (scroll) element?.scrollIntoView({ block: "center" });
  $("said").replaceChildren(...panel(doc, doc.rows[row]));
  drawSpark();
}
function panel(doc, row) {
  const heading = make("h2", "", row.p === null ? doc.name : "position " + row.p);
  if (row.t !== null) heading.append(" · ", make("bdi", "", JSON.stringify(row.t).slice(1, -1)));
  if (row.e) return [heading, make("p", "text", "Could not be explained: " + row.e)];
  const facts = make("dl");
  const fact = (name, value) => facts.append(make("dt", "", name), make("dd", "", value));
  fact("fve_nrm", number(row.f));
  fact("cos", number(row.c));
  if (row.n !== null) fact("norm", row.n.toPrecision(4));
  if (row.h) fact("hook", row.h);
  const bar = make("div", "bar");
  bar.style.width = Math.max(0, Math.min(1, score(row) ?? 0)) * 100 + "%";
  const flags = make("p");
  for (const flag of row.g) flags.append(make("span", "flag", flag));
  const said = claims(row);
  const parts = [heading, bar, ...said, facts, flags];
  if (row.s.length) {
    const samples = make("div", "samples");
    for (const sample of row.s) {
      const box = make("div");
      box.append(make("div", "text", sample.x), make("small", "", "fve_nrm " + number(sample.f) + " · cos " + number(sample.c)));
      samples.append(box);
    }
    parts.push(samples);
  }
  return parts;
}
function claims(row) {
  if (!row.k?.length) { const whole = make("p", "text"); whole.append(make("bdi", "", row.x)); return [whole]; }
  return row.k.map((claim) => {
    const line = make("div", "claim" + (claim.in === false ? " unseen" : ""), claim.x);
    if (claim.su !== null) {
      const bar = make("div", "bar");
      bar.style.width = Math.max(0, Math.min(1, claim.su)) * 100 + "%";
      bar.title = "support " + number(claim.su);
      line.append(bar);
    }
    return line;
  });
}
text.addEventListener("mouseover", (event) => {
  const row = event.target.closest?.(".r")?.dataset.row;
  if (row !== undefined && Number(row) !== state.row) show(Number(row), false);
});
text.addEventListener("click", (event) => {
  const row = event.target.closest?.(".r")?.dataset.row;
  if (row !== undefined) show(Number(row), false);
});

// --- fidelity along the text ------------------------------------------------------------------------------
const spark = $("spark");
function drawSpark() {
  const rows = documents[state.document]?.rows ?? [], box = spark.getBoundingClientRect(), scale = devicePixelRatio || 1;
  spark.width = box.width * scale; spark.height = box.height * scale;
  const context = spark.getContext("2d"), style = getComputedStyle(document.documentElement);
  const width = spark.width, height = spark.height, colour = (name) => style.getPropertyValue(name);
  context.strokeStyle = colour("--line");
  context.beginPath(); context.moveTo(0, height * 0.5); context.lineTo(width, height * 0.5); context.stroke();
  context.strokeStyle = colour("--faint"); context.lineWidth = scale;
  context.beginPath();
  const x = (i) => ((i + 0.5) / rows.length) * width;
  let drawing = false;
  // More rows than pixels: the lowest of each pixel is what one looks for.
  const step = Math.max(1, Math.floor(rows.length / width));
  for (let i = 0; i < rows.length; i += step) {
    let low = null;
    for (let k = i; k < Math.min(rows.length, i + step); k++) {
      const s = rows[k].e ? null : score(rows[k]);
      if (s !== null && (low === null || s < low)) low = s;
    }
    if (low === null) { drawing = false; continue; }
    const y = height * (0.95 - 0.9 * Math.max(0, Math.min(1, low)));
    drawing ? context.lineTo(x(i), y) : context.moveTo(x(i), y);
    drawing = true;
  }
  context.stroke();
  if (state.row >= 0) { context.fillStyle = colour("--mark"); context.fillRect(x(state.row) - scale, 0, 2 * scale, height); }
}
spark.addEventListener("click", (event) => {
  const rows = documents[state.document].rows, box = spark.getBoundingClientRect();
  if (rows.length) show(Math.min(rows.length - 1, Math.floor(((event.clientX - box.left) / box.width) * rows.length)), true);
});
addEventListener("resize", () => { drawSpark(); drawList(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawSpark);

// --- search -----------------------------------------------------------------------------------------------
function hitsOf(document) {
  return new Set(state.hits.filter(([d]) => d === document).map(([, r]) => r));
}
function search(query) {
  state.query = query.trim().toLowerCase();
  state.hits = []; state.hit = -1;
  if (state.query) documents.forEach((doc, d) => doc.rows.forEach((row, r) => {
    row.l ??= (row.x ?? row.e ?? "").toLowerCase();
    if (row.l.includes(state.query)) state.hits.push([d, r]);
  }));
  state.hitSet = hitsOf(state.document);
  for (const part of text.children) if (part.firstChild) { part.replaceChildren(); fill(part); }
  tell();
}
function tell() {
  $("found").textContent = !state.query ? "" : !state.hits.length ? "nothing found"
    : (state.hit >= 0 ? state.hit + 1 + " of " : "") + state.hits.length + " found";
}
function next(step) {
  if (!state.hits.length) return;
  state.hit = (state.hit + step + state.hits.length) % state.hits.length;
  openDocument(...state.hits[state.hit]);
  tell();
}
let waiting;
$("find").addEventListener("input", (event) => { clearTimeout(waiting); waiting = setTimeout(() => search(event.target.value), 120); });
$("find").addEventListener("keydown", (event) => {
  if (event.key === "Enter") { clearTimeout(waiting); if (event.target.value.trim().toLowerCase() !== state.query) search(event.target.value); next(event.shiftKey ? -1 : 1); }
  if (event.key === "Escape") { event.target.value = ""; search(""); event.target.blur(); }
  event.stopPropagation();
});

// --- keyboard ---------------------------------------------------------------------------------------------
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const rows = documents[state.document]?.rows.length ?? 0, last = rows - 1;
  const to = (row) => { event.preventDefault(); if (rows) show(Math.max(0, Math.min(last, row)), true); };
  switch (event.key) {
    case "ArrowRight": case "l": return to(state.row + 1);
    case "ArrowLeft": case "h": return to(state.row - 1);
    case "Home": return to(0);
    case "End": return to(last);
    case "ArrowDown": case "j": event.preventDefault(); return openDocument(state.document + 1);
    case "ArrowUp": case "k": event.preventDefault(); return openDocument(state.document - 1);
    case "n": return next(1);
    case "N": return next(-1);
    case "/": event.preventDefault(); return $("find").focus();
  }
});

// --- a store that is still being written ----------------------------------------------------------------------
async function follow() {
  try {
    const answer = await fetch("state", { cache: "no-store" });
    const found = await answer.json();
    $("about").textContent = found.about;
    if (found.token !== DATA.token) { sessionStorage.setItem("at", JSON.stringify([state.document, state.row])); location.reload(); return; }
    if (found.complete) return;
  } catch { $("about").textContent = "the server has ended"; return; }
  setTimeout(follow, 2000);
}
const kept = DATA.live ? JSON.parse(sessionStorage.getItem("at") ?? "null") : null;
if (documents.length) kept && documents[kept[0]]?.rows[kept[1]] ? openDocument(...kept) : openDocument(0);
drawList();
drawSpark();
if (DATA.live) follow();
