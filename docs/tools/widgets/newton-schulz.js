// The Newton-Schulz iteration on singular values: s -> a s + b s^3 + c s^5, step after step. data-value is the error of a
// matrix with the chosen spectrum, |X - U V^T| / sqrt(n) in the Frobenius norm. The triples are those of
// nanochat_native/ops/newton_schulz.py; a test compares them.
"use strict";
window.GUIDE_WIDGETS = window.GUIDE_WIDGETS || {};
window.GUIDE_WIDGETS["newton-schulz"] = function (element) {
  const { make, slider, choice, width, scale, svg } = window.GUIDE;
  const COEFFICIENTS = {
    cubic: [[1.5, -0.5, 0]],
    quintic: [[3.4445, -4.775, 2.0315]],
    polar_express: [
      [8.156554524902461, -22.48329292557795, 15.878769915207462],
      [4.042929935166739, -2.808917465908714, 0.5000178451051316],
      [3.8916678022926607, -2.772484153217685, 0.5060648178503393],
      [3.285753657755655, -2.3681294933425376, 0.46449024233003106],
      [2.3465413258596377, -1.7097828382687081, 0.42323551169305323],
    ],
  };
  const NORM_FACTOR = { polar_express: 1.01 };
  const COUNT = 32, NAMES = [["cubic", "cubic"], ["quintic", "quintic (Jordan)"], ["polar_express", "Polar Express"]];
  const state = { name: "cubic", steps: 5, smallest: -3 };
  const drawing = make("div");
  const readout = make("p", { class: "readout", role: "status" });
  const change = (key) => (value) => { state[key] = value; draw(); };
  element.append(make("div", { class: "controls" },
    choice("Coefficients", NAMES, state.name, change("name")),
    slider("Steps", { min: 0, max: 25, value: state.steps }, change("steps")),
    slider("Smallest over largest singular value", { min: -4, max: 0, step: 0.25, value: state.smallest, format: (v) => (10 ** v).toPrecision(2) }, change("smallest"))), drawing, readout);

  /** Return the singular value s after the steps. */
  function iterate(s, steps) {
    const triples = COEFFICIENTS[state.name];
    for (let step = 0; step < steps; step++) {
      const [a, b, c] = triples[Math.min(step, triples.length - 1)];
      s = a * s + b * s ** 3 + c * s ** 5;
    }
    return s;
  }

  function draw() {
    const relative = Array.from({ length: COUNT }, (_, i) => 10 ** (state.smallest * i / (COUNT - 1)));
    const norm = (NORM_FACTOR[state.name] || 1) * Math.sqrt(relative.reduce((sum, s) => sum + s * s, 0));
    const before = relative.map((s) => s / norm), after = before.map((s) => iterate(s, state.steps));
    const W = width(element), H = Math.min(320, W * 0.62);
    const x = scale(-4.6, 0, 40, W - 10), y = scale(0, 1.6, H - 34, 14);
    const line = (steps) => Array.from({ length: 601 }, (_, i) => -4.6 + 4.6 * i / 600).map((e) => x(e).toFixed(1) + "," + y(Math.min(1.65, iterate(10 ** e, steps))).toFixed(1)).join(" ");
    const earlier = [];
    for (let step = Math.max(0, state.steps - 4); step < state.steps; step++) earlier.push(make("polyline", { points: line(step), fill: "none", stroke: "var(--gray)", "stroke-width": 1, opacity: 0.25 + 0.15 * (4 - state.steps + step) }));
    drawing.replaceChildren(svg(W, H,
      ...[0, 0.5, 1, 1.5].flatMap((v) => [make("line", { x1: x(-4.6), x2: x(0), y1: y(v), y2: y(v), class: "axis" }), make("text", { x: 34, y: y(v) + 4, "text-anchor": "end", class: "faint" }, v.toFixed(1))]),
      ...[-4, -3, -2, -1, 0].map((e) => make("text", { x: x(e), y: H - 18, "text-anchor": "middle", class: "faint" }, String(10 ** e))),
      make("text", { x: W / 2, y: H - 2, "text-anchor": "middle", class: "faint" }, "singular value before, after division by the norm"),
      make("line", { x1: x(-4.6), x2: x(0), y1: y(1), y2: y(1), stroke: "var(--ink)", "stroke-dasharray": "3 4", opacity: 0.6 }),
      ...earlier,
      make("polyline", { points: line(state.steps), fill: "none", stroke: "var(--blue)", "stroke-width": 2 }),
      ...before.map((s, i) => make("circle", { cx: x(Math.log10(s)), cy: y(Math.min(1.65, after[i])), r: 3.6, fill: "var(--orange)" }))));
    const error = Math.sqrt(after.reduce((sum, s) => sum + (s - 1) ** 2, 0) / COUNT);
    readout.replaceChildren("After ", make("b", {}, String(state.steps)), state.steps === 1 ? " step: largest " : " steps: largest ", make("b", {}, Math.max(...after).toFixed(3)), ", smallest ", make("b", {}, Math.min(...after).toFixed(3)),
      ", error ", make("b", {}, error.toFixed(3)), ". The blue curve is the map of these steps, gray are earlier steps, the dots are " + COUNT + " singular values of one matrix.");
    element.dataset.value = error;
    element.dataset.largest = Math.max(...after);
  }
  addEventListener("resize", draw);
  draw();
};
