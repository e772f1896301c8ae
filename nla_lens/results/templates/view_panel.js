// --- one explanation ----------------------------------------------------------------------------------
const FLAGS = {
  partial: "still being written",
  truncated: "no closing tag in time: the text stops in the middle",
  early_position: "read earlier in its text than the NLA was trained on",
  outlier_norm: "the vector is ten times longer or shorter than usual",
  other_layer: "read at another place than the NLA was trained on",
  injection_suspect: "reads as if the vector had not been injected",
  low_fidelity: "the text gives back less than half of what it should",
  padding: "the vector stands at a padding token",
};
function drawPanel() {
  const doc = current(), row = doc?.rows[state.row];
  $("said").replaceChildren(...(row ? panel(doc, row) : [make("p", "hint", "Nothing was explained in this text.")]));
}
function panel(doc, row) {
  const parts = [heading(row)];
  const place = make("p", "place", [row.p === undefined ? `${state.row + 1} of ${doc.rows.length}` : `position ${row.p}`, row.h ?? doc.hook].filter(Boolean).join(" · "));
  parts.push(place);
  if (row.e) return [...parts, make("p", "said", `Could not be explained: ${row.e}`)];
  parts.push(...chips(row), ...(row.k ? claims(row) : [paragraph(row.x)]), facts(row));
  if (row.g?.length) parts.push(make("ul", "flags", ...row.g.map((flag) => make("li", "", make("b", "", make("bdi", "", flag)), FLAGS[flag] ?? ""))));
  if (row.s?.length) parts.push(make("h3", "", `${row.s.length} samples, best first`), make("div", "samples", ...row.s.map(sample)));
  return parts;
}
function heading(row) {
  const title = make("h2", "", make("bdi", "token", row.t === "●" ? "vector" : spelled(row.t)));
  const held = state.held ? [button("step held", "held ✕", "Let it go ( Esc )", () => hold(false))] : [];
  return make("div", "heading", title, ...held,
    button("step", "‹", "Token before ( ← )", () => move(-1)), button("step", "›", "Token after ( → )", () => move(1)));
}
const spelled = (word) => word.replaceAll("\n", "⏎").replace(/^ | $/g, "␣");
// What the colours show and how far to trust it come before the text.
function chips(row) {
  const shown = [...new Set([state.measure, "u"])].filter((name) => row[name] !== undefined);
  const chip = (name) => { const held = make("span", "", make("b", shadeOf(row[name]), number(row[name])), " ", MEASURES[name][0]); held.title = MEASURES[name][1]; return held; };
  return shown.length ? [make("p", "score", ...shown.map(chip))] : [];
}
function facts(row) {
  const held = make("dl");
  for (const name of ["f", "c"])
    if (name !== state.measure && row[name] !== undefined) held.append(make("dt", "", MEASURES[name][0]), make("dd", "", number(row[name])));
  if (row.n !== undefined) held.append(make("dt", "", "norm ‖v‖"), make("dd", "", row.n.toPrecision(4)));
  return held;
}
function sample(said) {
  const scored = ["f", "c"].filter((name) => said[name] !== undefined).map((name) => `${MEASURES[name][0]} ${number(said[name])}`);
  return make("div", "", make("small", "hint", scored.join(" · ")), paragraph(said.x));
}
// A text in which spans `[start, end, class, verdict]` are marked, and what was searched for.
function paragraph(said, spans = []) {
  const held = make("p", "said");
  let from = 0;
  for (const [start, end, className, verdict] of spans) {
    const mark = /^(…|\.\.\.)?[”»」“"]/.exec(said.slice(end))?.[0] ?? "";
    held.append(...found(said.slice(from, start)), make("span", className, ...found(said.slice(start, end))), mark, make("span", `verdict of-${className}`, verdict));
    from = end + mark.length;
  }
  held.append(...found(said.slice(from)));
  return held;
}
function found(said) {
  const lower = said.toLowerCase(), parts = [];
  // Where small letters are more or fewer, places cannot be told.
  if (!state.query || lower.length !== said.length) return [said];
  let at = 0;
  for (let hit; (hit = lower.indexOf(state.query, at)) >= 0; at = hit + state.query.length)
    parts.push(said.slice(at, hit), make("mark", "", said.slice(hit, hit + state.query.length)));
  return [...parts, said.slice(at)];
}
// Sentences with a bar of support, and in them the quotations that were looked up.
function claims(row) {
  const parts = [], most = Math.max(...row.k.map((claim) => Math.abs(claim.u ?? 0)), 1e-9);
  row.k.forEach((claim, i) => {
    if (claim.q) return;
    const quotes = [], spans = [];
    for (let k = i + 1; row.k[k]?.q; k++) quotes.push(row.k[k]);
    let at = 0;
    for (const quote of quotes) {
      const start = claim.x.indexOf(quote.x, at);
      if (start < 0) continue;
      at = start + quote.x.length;
      if (quote.i !== undefined) spans.push([start, at, ...(quote.i ? ["seen", "✓ in the text"] : ["unseen", "✗ not in the text"])]);
    }
    parts.push(make("div", "claim", paragraph(claim.x, spans), ...support(claim, most, "")),
      ...quotes.flatMap((quote) => (quote.u === undefined && quote.a === undefined ? [] : [make("div", "claim within", ...support(quote, most, `“${quote.x}”: `))])));
  });
  return [...parts, make("p", "hint", "Support: how much fidelity falls without a sentence or quotation. It is what carries the vector, not what is true.")];
}
function support(claim, most, of) {
  const facts = [];
  if (claim.u !== undefined) facts.push(claim.u >= 0 ? `support ${number(claim.u)}` : `support ${number(claim.u)}, better without it`);
  if (claim.a !== undefined) facts.push(`agreement ${number(claim.a)}`);
  if (!facts.length) return [];
  const line = make("small", "", make("bdi", "", of), facts.join(" · "));
  if (claim.u === undefined) return [line];
  const fill = make("i", claim.u < 0 ? "against" : "");
  fill.style.width = (100 * Math.abs(claim.u)) / most + "%";
  const bar = make("span", "bar", fill);
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", `support ${number(claim.u)}`);
  return [bar, line];
}
