// --- documents: of a long list, only what is seen is there ---------------------------------------------
const ROW_HEIGHT = 68, CELLS = 60;
const scroller = $("scroll"), space = $("space");
let listed = [];
function order() {
  listed = documents.map((_, i) => i);
  const key = state.sort === "order" ? null : (i) => summary(documents[i])[state.sort] ?? Infinity;
  if (key) listed.sort((a, b) => key(a) - key(b));
}
function drawList(toCurrent) {
  const at = listed.indexOf(state.document);
  if (toCurrent && at >= 0) {
    const top = at * ROW_HEIGHT, height = scroller.clientHeight;
    if (top < scroller.scrollTop) scroller.scrollTop = top;
    else if (top + ROW_HEIGHT > scroller.scrollTop + height) scroller.scrollTop = top + ROW_HEIGHT - height;
  }
  $("where").textContent = `${at + 1} / ${documents.length}`;
  document.body.classList.toggle("single", documents.length < 2);
  space.style.height = documents.length * ROW_HEIGHT + "px";
  const first = Math.max(0, Math.floor(scroller.scrollTop / ROW_HEIGHT) - 2);
  const last = first + Math.ceil(scroller.clientHeight / ROW_HEIGHT) + 5;
  const colour = palette(), entries = listed.slice(first, last).map((i, k) => entry(i, (first + k) * ROW_HEIGHT));
  space.replaceChildren(...entries);
  entries.forEach((element) => drawStrip(element.lastChild, documents[element.dataset.document], colour));
}
function entry(i, top) {
  const doc = documents[i], known = summary(doc), low = known.worst[0], found = state.found?.get(i)?.size;
  const element = button("doc", make("b", "", make("bdi", "", doc.name)), doc.name, () => {
    document.body.classList.remove("listing");
    openDocument(i);
  });
  const facts = [`mean ${number(known.mean)}`];
  if (low !== undefined) facts.push(`lowest ${told(doc.rows[low])}`);
  if (known.flagged) facts.push(`${known.flagged} flagged`);
  const line = make("small", "", found ? make("em", "", `${found} found · `) : "", facts.join(" · "));
  element.append(line, make("canvas"));
  element.style.top = top + "px";
  element.dataset.document = i;
  element.setAttribute("aria-current", String(i === state.document));
  return element;
}
// The lowest of each stretch: where in the document its worst places are.
function drawStrip(canvas, doc, colour) {
  const n = Math.min(CELLS, doc.rows.length);
  canvas.width = n * Math.ceil(240 / n);
  canvas.height = 1;
  const context = canvas.getContext("2d");
  stretches(doc.rows, n).forEach((low, k) => {
    if (low === null) return;
    context.fillStyle = colour(shadeOf(low));
    context.fillRect((k * canvas.width) / n, 0, canvas.width / n, 1);
  });
}
function stretches(rows, n) {
  return Array.from({ length: n }, (_, k) => {
    let low = null;
    const end = Math.max(Math.floor(((k + 1) * rows.length) / n), Math.floor((k * rows.length) / n) + 1);
    for (let i = Math.floor((k * rows.length) / n); i < end; i++) {
      const s = rows[i].e ? -Infinity : score(rows[i]);
      if (s !== null && (low === null || s < low)) low = s;
    }
    return low;
  });
}
// The colours of the style sheet, as they are now.
function palette() {
  const style = getComputedStyle(document.documentElement);
  return (name) => style.getPropertyValue(`--${name}`);
}
function step(by) {
  openDocument(listed[listed.indexOf(state.document) + by]);
}
scroller.addEventListener("scroll", () => drawList(), { passive: true });
$("sort").addEventListener("change", (event) => { state.sort = event.target.value; order(); drawList(true); });
$("menu").addEventListener("click", () => {
  const open = document.body.classList.toggle("listing");
  $("menu").setAttribute("aria-expanded", String(open));
  drawList(true);
});
