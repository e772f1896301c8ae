"use strict";
// Everything shown goes in by textContent: what models and strangers wrote is never parsed as HTML.
// This file holds what is shown and who may change it; view_list, view_text and view_panel draw it,
// view_keys listens.
const DATA = JSON.parse(document.getElementById("data").textContent);
let documents = DATA.documents.map(unpacked);
const $ = (id) => document.getElementById(id);
const make = (tag, className, ...content) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...content);
  return element;
};
const button = (className, content, title, act) => {
  const element = make("button", className, content);
  if (title) element.title = title;
  element.addEventListener("click", act);
  return element;
};
// Tokens as [text, row or -1, whether it is special].
function unpacked(doc) {
  const special = new Set(doc.special);
  let row = 0;
  doc.tokens = doc.tokens.map((token, i) => {
    const explained = typeof token === "string";
    if (explained) doc.rows[row].t = token;
    return [explained ? token : token[0], explained ? row++ : -1, special.has(i)];
  });
  return doc;
}
const state = { document: -1, row: -1, held: false, measure: "f", query: "", hits: [], hit: -1, sort: "order" };
const current = () => documents[state.document];

// --- scores ---------------------------------------------------------------------------------------
const MEASURES = {
  f: ["fve_nrm", "share of the vector's variance that the text gives back: 1 is perfect, 0 no better than the average vector"],
  c: ["cos", "cosine of the vector and what the text gives back: 1 is the same direction, 0 none of it"],
  u: ["trust", "calibrated probability that the text names nothing wrong: 1 is certain"],
};
const STEPS = [0, 0.25, 0.5, 0.65, 0.8, 0.92];
const score = (row) => (row.e ? null : row[state.measure] ?? null);
const shadeOf = (value) => (value === null ? "none" : "f" + STEPS.filter((step) => value >= step).length);
const shade = (row) => (row.e ? "none failed" : shadeOf(score(row)));
const number = (value) => (value === null || value === undefined ? "–" : value.toFixed(3).replace("-", "−"));
const told = (row) => (row.e ? "failed" : number(score(row)));
function measures() {
  return Object.keys(MEASURES).filter((name) => documents.some((doc) => doc.rows.some((row) => row[name] !== undefined)));
}
// What is known of a document by the measure that is shown; worked out once.
function summary(doc) {
  if (doc.known?.measure === state.measure) return doc.known;
  const scored = [], failed = [];
  doc.rows.forEach((row, i) => { const s = score(row); if (row.e) failed.push(i); else if (s !== null) scored.push([s, i]); });
  const mean = scored.length ? scored.reduce((sum, [s]) => sum + s, 0) / scored.length : null;
  scored.sort((a, b) => a[0] - b[0]);
  const worst = [...failed, ...scored.map(([, i]) => i)];
  doc.known = {
    measure: state.measure, mean, worst: worst.slice(0, 5), failed: failed.length,
    lowest: failed.length ? -Infinity : scored[0]?.[0] ?? null,
    flagged: doc.rows.filter((row) => row.g?.length).length,
  };
  return doc.known;
}

// --- moving about -----------------------------------------------------------------------------------
function openDocument(i, row) {
  if (!documents[i]) return;
  if (i !== state.document) {
    state.document = i;
    state.row = -1;
    state.held = false;
    drawText();
    drawList(true);
    drawSpark();
  }
  show(row ?? (documents[i].rows.length ? 0 : -1), row !== undefined);
}
function show(row, scroll) {
  state.row = row;
  mark(row, scroll);
  drawPanel();
  remember();
}
function hold(held) {
  state.held = held;
  drawPanel();
}
function measure(name) {
  state.measure = name;
  $("measure").value = name;
  drawScale();
  order();
  drawList();
  recolour();
  drawSpark();
  drawPanel();
}
// A link to this page leads back to the same token.
let remembering;
function remember() {
  clearTimeout(remembering);
  remembering = setTimeout(() => {
    try { history.replaceState(null, "", `#${state.document + 1}.${state.row + 1}`); } catch { /* in a frame without an address */ }
  }, 400);
}
function remembered() {
  const [, doc, row] = /^#(\d+)\.(\d+)$/.exec(location.hash) ?? [];
  return documents[doc - 1]?.rows[row - 1] ? [doc - 1, row - 1] : [0];
}

// --- search -------------------------------------------------------------------------------------------
function search(query) {
  state.query = query.trim().toLowerCase();
  state.hits = [];
  state.hit = -1;
  state.found = new Map();
  if (state.query) documents.forEach((doc, d) => doc.rows.forEach((row, r) => {
    row.l ??= (row.x ?? row.e ?? "").toLowerCase();
    if (!row.l.includes(state.query)) return;
    state.hits.push([d, r]);
    if (!state.found.has(d)) state.found.set(d, new Set());
    state.found.get(d).add(r);
  }));
  recolour();
  drawList();
  drawPanel();
  tell();
}
function tell() {
  $("found").textContent = !state.query ? "" : !state.hits.length ? "nothing found"
    : (state.hit >= 0 ? state.hit + 1 + " of " : "") + state.hits.length + " found";
}
function nextHit(step) {
  if (!state.hits.length) return;
  state.hit = (state.hit + step + state.hits.length) % state.hits.length;
  if (state.hit < 0) state.hit = state.hits.length - 1;
  openDocument(...state.hits[state.hit]);
  tell();
}
