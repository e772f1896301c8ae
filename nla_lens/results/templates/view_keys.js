// --- keyboard ---------------------------------------------------------------------------------------------
function move(by) {
  const n = current()?.rows.length ?? 0;
  if (n) show(Math.max(0, Math.min(n - 1, state.row + by)), true);
}
function along(rows, by) {
  if (!rows.length) return;
  const next = by > 0 ? rows.find((row) => row > state.row) ?? rows[0] : rows.findLast((row) => row < state.row) ?? rows.at(-1);
  show(next, true);
}
const flagged = () => current().rows.flatMap((row, i) => (row.g?.length || row.e ? [i] : []));
const KEYS = {
  ArrowRight: () => move(1), l: () => move(1),
  ArrowLeft: () => move(-1), h: () => move(-1),
  Home: () => move(-Infinity), End: () => move(Infinity),
  ArrowDown: () => step(1), j: () => step(1),
  ArrowUp: () => step(-1), k: () => step(-1),
  n: () => nextHit(1), N: () => nextHit(-1),
  w: () => { const { worst } = summary(current()); if (worst.length) show(worst[(worst.indexOf(state.row) + 1) % worst.length], true); },
  f: () => along(flagged(), 1), F: () => along(flagged(), -1),
  c: () => { const known = measures(); measure(known[(known.indexOf(state.measure) + 1) % known.length] ?? "f"); },
  p: () => hold(!state.held),
  Escape: () => hold(false),
  "/": () => $("find").focus(),
  "?": () => $("help").showModal(),
};
addEventListener("keydown", (event) => {
  const typed = event.target.matches?.("input, select, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey || typed || $("help").open || !Object.hasOwn(KEYS, event.key)) return;
  event.preventDefault();
  if (current()) KEYS[event.key]();
});
let waiting;
$("find").addEventListener("input", (event) => { clearTimeout(waiting); waiting = setTimeout(() => search(event.target.value), 120); });
$("find").addEventListener("keydown", (event) => {
  const field = event.target;
  if (event.key === "Enter") {
    clearTimeout(waiting);
    if (field.value.trim().toLowerCase() !== state.query) search(field.value);
    nextHit(event.shiftKey ? -1 : 1);
  } else if (event.key === "Escape") {
    clearTimeout(waiting);
    field.value = "";
    search("");
    field.blur();
  }
});
$("ask").addEventListener("click", () => $("help").showModal());
$("measure").addEventListener("change", (event) => measure(event.target.value));

// --- a store that is still being written ----------------------------------------------------------------------
async function follow() {
  let pause = 2000;
  try {
    const found = await (await fetch("state", { cache: "no-store" })).json();
    if (found.token !== DATA.token) {
      const started = performance.now();
      const fresh = await (await fetch("data", { cache: "no-store" })).json();
      renew(fresh);
      // A large store is not read all the time.
      pause = Math.max(pause, 10 * (performance.now() - started));
    }
    $("about").textContent = found.about;
    if (found.complete && found.token === DATA.token) return;
  } catch {
    $("about").textContent = "the server does not answer";
    pause = 10000;
  }
  setTimeout(follow, pause);
}
// What was looked at, searched for and held stays so; a text that has grown is drawn anew.
function renew(fresh) {
  const before = current()?.tokens.length, top = main.scrollTop, { query } = state;
  documents = fresh.documents.map(unpacked);
  DATA.token = fresh.token;
  offer();
  order();
  if (state.document < 0) openDocument(0);
  else if (current().tokens.length !== before) { drawText(); main.scrollTop = top; mark(state.row, false); drawSpark(); }
  const hit = state.hit;
  search(query);
  state.hit = Math.min(hit, state.hits.length - 1);
  tell();
}

// --- the beginning --------------------------------------------------------------------------------------------
function offer() {
  const known = measures();
  if (!known.includes(state.measure)) state.measure = known[0] ?? "f";
  $("measure").replaceChildren(...(known.length ? known : ["f"]).map((name) => new Option(MEASURES[name][0], name, false, name === state.measure)));
  drawScale();
}
offer();
order();
if (documents.length) openDocument(...remembered());
else drawPanel();
drawList(true);
addEventListener("resize", () => { drawSpark(); drawList(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { drawSpark(); drawList(); });
if (DATA.live) follow();
