// A ring of four ranks: three steps of reduce-scatter, then three of all-gather. data-value is the number of MiB that each
// rank has sent; data-sums are the numbers that the ranks hold, rank by rank.
"use strict";
window.GUIDE_WIDGETS = window.GUIDE_WIDGETS || {};
window.GUIDE_WIDGETS["ring"] = function (element) {
  const { make, slider, button, width, svg } = window.GUIDE;
  const RANKS = 4, STEPS = 2 * (RANKS - 1);
  const state = { step: 0, size: 64 };
  const drawing = make("div"), readout = make("p", { class: "readout", role: "status" });
  const progress = slider("Steps done", { min: 0, max: STEPS, value: 0 }, (value) => { state.step = value; draw(); });
  const input = progress.querySelector("input");
  const go = (step) => { input.value = step; input.dispatchEvent(new Event("input")); };
  const back = button("Back", () => go(state.step - 1)), next = button("Next step", () => go(state.step + 1));
  element.append(make("div", { class: "controls" }, progress, make("div", { class: "row" }, back, next),
    slider("Size of the gradient", { min: 4, max: 256, step: 4, value: state.size, format: (v) => v + " MiB" }, (value) => { state.size = value; draw(); })), drawing, readout);
  const modulo = (x) => ((x % RANKS) + RANKS) % RANKS;

  /** Return which chunk rank r sends to rank r + 1 in a step. */
  const sent = (r, step) => (step < RANKS - 1 ? modulo(r - step) : modulo(r + 1 - (step - (RANKS - 1))));

  /** Return the chunks of each rank after the steps: their number, and the ranks whose gradient it contains. */
  function after(steps) {
    let ranks = Array.from({ length: RANKS }, (_, r) => Array.from({ length: RANKS }, (_, c) => ({ value: 10 ** r * (c + 1), from: [r] })));
    for (let step = 0; step < steps; step++) {
      const now = ranks.map((chunks) => chunks.slice());
      for (let r = 0; r < RANKS; r++) {
        const c = sent(r, step), receiver = modulo(r + 1), packet = ranks[r][c], own = ranks[receiver][c];
        now[receiver][c] = step < RANKS - 1 ? { value: own.value + packet.value, from: [...own.from, ...packet.from] } : packet;
      }
      ranks = now;
    }
    return ranks;
  }

  function draw() {
    const ranks = after(state.step), W = width(element), gap = W > 480 ? 46 : 20, box = (W - 8 - (RANKS - 1) * gap) / RANKS, high = 40, top = 30;
    const nodes = [];
    const colors = ["var(--blue)", "var(--orange)", "var(--green)", "var(--purple)"];
    for (let r = 0; r < RANKS; r++) {
      const left = 4 + r * (box + gap);
      nodes.push(make("text", { x: left + box / 2, y: 18, "text-anchor": "middle", style: "font-weight:600" }, "rank " + r));
      for (let c = 0; c < RANKS; c++) {
        const chunk = ranks[r][c], y = top + c * (high + 6), whole = chunk.from.length === RANKS;
        const arrived = state.step > 0 && sent(modulo(r - 1), state.step - 1) === c;
        nodes.push(make("rect", { x: left, y, width: box, height: high, rx: 4, fill: whole ? "var(--tip-soft)" : "var(--soft)", stroke: whole ? "var(--green)" : arrived ? "var(--orange)" : "var(--line)", "stroke-width": arrived ? 2.5 : 1 }));
        const part = (box - 8) / RANKS; // one stripe for each rank whose gradient the chunk contains
        for (const from of chunk.from) nodes.push(make("rect", { x: left + 4 + from * part, y: y + high - 8, width: part - 2, height: 4, fill: colors[from] }));
        nodes.push(make("text", { x: left + box / 2, y: y + 20, "text-anchor": "middle", style: (box < 60 ? "font-size:11px;" : "") + (whole ? "font-weight:600" : "") }, String(chunk.value)));
        const outgoing = state.step < STEPS && sent(r, state.step) === c;
        if (outgoing) {
          const x = left + box + 3, end = left + box + gap - 3, middle = y + high / 2;
          const path = r === RANKS - 1 ? "M" + (left + box / 2) + " " + (y + high) : "M" + x + " " + middle + "H" + end + "m-5 -4l5 4l-5 4";
          nodes.push(make("path", { d: path, fill: "none", stroke: "var(--orange)", "stroke-width": 2 }));
        }
      }
    }
    const y = top + RANKS * (high + 6) + 12;
    if (state.step < STEPS) {
      const c = sent(RANKS - 1, state.step);
      const right = 4 + (RANKS - 1) * (box + gap) + box / 2, left = 4 + box / 2;
      nodes.push(make("path", { d: "M" + right + " " + (y - 14) + "V" + y + "H" + left + "V" + (y - 12) + "m-4 5l4 -5l4 5", fill: "none", stroke: "var(--orange)", "stroke-width": 2 }),
        make("text", { x: W / 2, y: y + 16, "text-anchor": "middle", class: "faint" }, "rank " + (RANKS - 1) + " sends its chunk " + c + " to rank 0"));
    }
    drawing.replaceChildren(svg(W, y + 22, ...nodes));
    const mebibytes = state.step * state.size / RANKS;
    const phase = state.step === 0 ? "Each rank holds its own gradient in four chunks, one below the other. Arrows show what is sent next."
      : state.step < RANKS - 1 ? "Reduce-scatter: the receiver adds the chunk to its own."
      : state.step === RANKS - 1 ? "Reduce-scatter is complete: each rank holds one chunk of the whole sum, marked in green."
      : state.step < STEPS ? "All-gather: the receiver replaces its chunk by the whole sum."
      : "All-gather is complete: every rank holds every sum.";
    readout.replaceChildren(phase + " Each rank has sent ", make("b", {}, mebibytes + " MiB"), ", that is " + state.step + " × " + state.size + " / " + RANKS + ".");
    back.disabled = state.step === 0;
    next.disabled = state.step === STEPS;
    element.dataset.value = mebibytes;
    element.dataset.sums = JSON.stringify(ranks.map((chunks) => chunks.map((chunk) => chunk.value)));
  }
  addEventListener("resize", draw);
  draw();
};
