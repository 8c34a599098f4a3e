// Rotary position embedding: the arrows of a query and a key turn with their positions, the angle between them depends on
// the distance only. data-value is the score, q . k of two unit vectors in one pair of coordinates.
"use strict";
window.GUIDE_WIDGETS = window.GUIDE_WIDGETS || {};
window.GUIDE_WIDGETS["rope"] = function (element) {
  const { make, slider, width, scale, svg } = window.GUIDE;
  const BASE = 10000, DIMENSIONS = 128;
  const QUERY = 0, KEY = Math.atan2(0.6, 0.8); // the angles of q = (1, 0) and k = (0.8, 0.6) before any rotation
  const state = { m: 6, n: 2, pair: 16 };
  const drawing = make("div");
  const readout = make("p", { class: "readout", role: "status" });
  const change = (name) => (value) => { state[name] = value; draw(); };
  const both = make("div", { class: "row" }, ...[-5, -1, 1, 5].map((shift) => window.GUIDE.button((shift < 0 ? "− " : "+ ") + Math.abs(shift), () => {
    const by = Math.max(shift, -Math.min(state.m, state.n));
    const most = Math.min(by, 63 - Math.max(state.m, state.n));
    state.m += most;
    state.n += most;
    query.querySelector("input").value = state.m;
    key.querySelector("input").value = state.n;
    for (const field of [query, key]) field.querySelector("input").dispatchEvent(new Event("input"));
  })));
  const query = slider("Position m of the query", { min: 0, max: 63, value: state.m }, change("m"));
  const key = slider("Position n of the key", { min: 0, max: 63, value: state.n }, change("n"));
  const pair = slider("Pair of coordinates", { min: 0, max: 63, value: state.pair }, change("pair"));
  element.append(
    make("div", { class: "controls" }, query, key, pair, make("div", {}, make("label", {}, "Shift both positions"), both)), drawing, readout);

  function arrow(center, radius, angle, color, name) {
    const at = (r, a) => [center[0] + r * Math.cos(a), center[1] - r * Math.sin(a)];
    const [x, y] = at(radius, angle), [lx, ly] = at(radius + 12, angle);
    const head = [at(radius, angle), at(radius - 11, angle + 0.07), at(radius - 11, angle - 0.07)].map((p) => p.join(",")).join(" ");
    return make("g", {}, make("line", { x1: center[0], y1: center[1], x2: x, y2: y, stroke: color, "stroke-width": 2.5 }),
      make("polygon", { points: head, fill: color }), make("text", { x: lx, y: ly + 4, "text-anchor": "middle", style: "fill:" + color + ";font-weight:600" }, name));
  }

  function draw() {
    const theta = BASE ** (-2 * state.pair / DIMENSIONS);
    const q = QUERY - state.m * theta, k = KEY - state.n * theta;
    const score = Math.cos(q) * Math.cos(k) + Math.sin(q) * Math.sin(k);
    const W = width(element), wide = W > 480, H = wide ? 240 : 420;
    const center = wide ? [115, 120] : [W / 2, 110], radius = 88;
    const small = 26, from = Math.min(q, k), span = ((Math.max(q, k) - from) % (2 * Math.PI) + 2 * Math.PI) % (2 * Math.PI);
    const start = span > Math.PI ? from + span : from, sweep = span > Math.PI ? 2 * Math.PI - span : span;
    const point = (a) => [center[0] + small * Math.cos(a), center[1] - small * Math.sin(a)].join(" ");
    const left = wide ? 290 : 34, right = W - 12, top = wide ? 24 : 250, bottom = H - 38;
    const x = scale(-63, 63, left, right), y = scale(-1.05, 1.05, bottom, top);
    const curve = [];
    for (let d = -63; d <= 63; d += 0.25) curve.push(x(d).toFixed(1) + "," + y(Math.cos(QUERY - KEY - d * theta)).toFixed(1));
    const distance = state.m - state.n;
    drawing.replaceChildren(svg(W, H,
      make("circle", { cx: center[0], cy: center[1], r: radius, class: "axis" }),
      make("path", { d: "M" + point(start) + " A" + small + " " + small + " 0 0 0 " + point(start + sweep), fill: "none", stroke: "var(--orange)", "stroke-width": 2 }),
      arrow(center, radius, q, "var(--blue)", "q"), arrow(center, radius, k, "var(--green)", "k"),
      make("line", { x1: left, x2: right, y1: y(0), y2: y(0), class: "axis" }), make("line", { x1: x(0), x2: x(0), y1: top, y2: bottom, class: "axis" }),
      make("polyline", { points: curve.join(" "), fill: "none", stroke: "var(--gray)", "stroke-width": 1.3 }),
      make("circle", { cx: x(distance), cy: y(score), r: 5.5, fill: "var(--orange)" }),
      make("text", { x: (left + right) / 2, y: H - 6, "text-anchor": "middle", class: "faint" }, "m − n"),
      make("text", { x: left, y: top - 8, class: "faint" }, "score of this pair"),
      ...[-60, -30, 0, 30, 60].map((d) => make("text", { x: x(d), y: bottom + 15, "text-anchor": "middle", class: "faint" }, String(d).replace("-", "−"))),
      ...[-1, 1].map((v) => make("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end", class: "faint" }, String(v).replace("-", "−")))));
    const degrees = (angle) => (angle * 180 / Math.PI).toFixed(1).replace("-", "−") + "°";
    readout.replaceChildren("θ = ", theta.toPrecision(3), " radians a position. The query stands at ", degrees(q), ", the key at ", degrees(k),
      ". Angle between them, ", make("b", {}, degrees(k - q)), ", and score, ", make("b", {}, score.toFixed(3).replace("-", "−")), ", depend on m − n = ", make("b", {}, String(distance).replace("-", "−")), " only.");
    element.dataset.value = score;
  }
  addEventListener("resize", draw);
  draw();
};
