// Attention without the matrix: the running maximum m, sum l and output o of each row change tile by tile, and end at the
// result of the direct softmax. data-value is the sum of the outputs so far; the test computes the same in Python.
"use strict";
window.GUIDE_WIDGETS = window.GUIDE_WIDGETS || {};
window.GUIDE_WIDGETS["tiles"] = function (element) {
  const { make, slider, choice, button, width, svg } = window.GUIDE;
  const T = 8;
  const values = Array.from({ length: T }, (_, j) => j + 1); // one number a key, so that o is one number a row
  const state = { size: 2, scores: "ordinary", step: 0 };
  const drawing = make("div"), table = make("div", { class: "scroll" });
  const readout = make("p", { class: "readout", role: "status" });
  const progress = slider("Tiles done", { min: 0, max: 1, value: 0 }, (value) => { state.step = value; draw(); });
  const input = progress.querySelector("input");
  const go = (step) => { input.value = step; input.dispatchEvent(new Event("input")); };
  const back = button("Back", () => go(state.step - 1)), next = button("Next tile", () => go(state.step + 1));
  element.append(make("div", { class: "controls" },
    choice("Tile", [[2, "2 by 2"], [4, "4 by 4"]], 2, (value) => { state.size = Number(value); begin(); }),
    choice("Scores", ["ordinary", "one of 800"], state.scores, (value) => { state.scores = value; draw(); }),
    progress, make("div", { class: "row" }, back, next)), make("div", { class: "beside" }, drawing, table), readout);

  /** Return the score of query i and key j. */
  function score(i, j) {
    if (state.scores !== "ordinary" && i === 5 && j === 3) return 800;
    return ((7 * i * i + 11 * j + 3 * i * j) % 41) / 10 - 2;
  }
  /** Return the tiles (first row, first key) that the causal mask does not hide, in the order of the walk. */
  function tiles() {
    const list = [];
    for (let i = 0; i < T; i += state.size) for (let j = 0; j <= i; j += state.size) list.push([i, j]);
    return list;
  }
  /** Return m, l and o of each row after the first tiles. */
  function walk(list) {
    const rows = Array.from({ length: T }, () => ({ m: -Infinity, l: 0, o: 0 }));
    for (const [i0, j0] of list) {
      for (let i = i0; i < i0 + state.size; i++) {
        const keys = [];
        for (let j = j0; j < j0 + state.size && j <= i; j++) keys.push(j);
        if (!keys.length) continue;
        const row = rows[i], m = Math.max(row.m, ...keys.map((j) => score(i, j))), shrink = Math.exp(row.m - m);
        row.l = row.l * shrink + keys.reduce((sum, j) => sum + Math.exp(score(i, j) - m), 0);
        row.o = row.o * shrink + keys.reduce((sum, j) => sum + Math.exp(score(i, j) - m) * values[j], 0);
        row.m = m;
      }
    }
    return rows;
  }
  /** Return the output of row i computed from all its scores at once, minus `shift` in the exponents. */
  function direct(i, shift) {
    const weights = values.slice(0, i + 1).map((_, j) => Math.exp(score(i, j) - shift));
    return weights.reduce((sum, w, j) => sum + w * values[j], 0) / weights.reduce((sum, w) => sum + w, 0);
  }
  function begin() {
    input.max = tiles().length;
    go(0);
  }
  function draw() {
    const list = tiles(), done = list.slice(0, state.step), current = done.at(-1), rows = walk(done);
    const cell = Math.min(36, Math.floor((width(element) - 26) / T)), left = 24, size = left + T * cell + 2;
    const nodes = [];
    const inside = ([i0, j0], i, j) => i >= i0 && i < i0 + state.size && j >= j0 && j < j0 + state.size;
    for (let i = 0; i < T; i++) {
      nodes.push(make("text", { x: left - 8, y: 22 + i * cell + cell / 2 + 4, "text-anchor": "end", class: "faint" }, String(i)), make("text", { x: left + i * cell + cell / 2, y: 14, "text-anchor": "middle", class: "faint" }, String(i)));
      for (let j = 0; j < T; j++) {
        const hidden = j > i, now = current && inside(current, i, j), before = !now && done.some((tile) => inside(tile, i, j));
        const fill = hidden ? "var(--soft)" : now ? "var(--orange)" : before ? "var(--blue)" : "none";
        nodes.push(make("rect", { x: left + j * cell, y: 22 + i * cell, width: cell, height: cell, fill, "fill-opacity": hidden ? 1 : now ? 0.35 : 0.16, stroke: "var(--line)" }));
        if (!hidden) nodes.push(make("text", { x: left + (j + 0.5) * cell, y: 22 + (i + 0.5) * cell + 4, "text-anchor": "middle", style: cell < 38 ? "font-size:10.5px" : "" }, score(i, j).toFixed(score(i, j) > 99 ? 0 : 1).replace("-", "−")));
      }
    }
    if (current) nodes.push(make("rect", { x: left + current[1] * cell, y: 22 + current[0] * cell, width: state.size * cell, height: state.size * cell, fill: "none", stroke: "var(--orange)", "stroke-width": 2.5 }));
    const picture = svg(size, 26 + T * cell, ...nodes);
    picture.style.width = size + "px";
    drawing.replaceChildren(picture);
    const number = (x) => (Number.isFinite(x) ? x.toFixed(x > 99 ? 1 : 3).replace("-", "−") : x === -Infinity ? "−∞" : Number.isNaN(x) ? "NaN" : "∞");
    const line = (cells, tag) => make("tr", {}, ...cells.map((text) => make(tag, {}, text)));
    table.replaceChildren(make("table", {}, make("thead", {}, line(["row", "m", "l", "o / l", "direct", "naive"], "th")), make("tbody", {}, ...rows.map((row, i) => {
      const found = row.l ? number(row.o / row.l) : "–";
      const tr = line([String(i), number(row.m), number(row.l), found, number(direct(i, Math.max(...values.slice(0, i + 1).map((_, j) => score(i, j))))), number(direct(i, 0))], "td");
      if (current && i >= current[0] && i < current[0] + state.size) tr.style.background = "color-mix(in srgb, var(--orange) 16%, transparent)";
      return tr;
    }))));
    const total = rows.reduce((sum, row) => sum + (row.l ? row.o / row.l : 0), 0);
    readout.textContent = state.step === 0 ? "Nothing is computed yet. Rows are queries, columns are keys, and value j is j + 1. “Direct” is the softmax of the whole row, “naive” the same without subtracting the maximum."
      : "Tile " + state.step + " of " + list.length + ": queries " + current[0] + " to " + (current[0] + state.size - 1) + ", keys " + current[1] + " to " + (current[1] + state.size - 1) + ". " +
        (state.step === list.length ? "Every row has reached the direct result, and no more than " + state.size * state.size + " scores were held at a time." : "Tiles above the diagonal are never computed.");
    back.disabled = state.step === 0;
    next.disabled = state.step === list.length;
    element.dataset.value = total;
  }
  addEventListener("resize", draw);
  begin();
};
