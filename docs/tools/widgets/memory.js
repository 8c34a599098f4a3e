// The predicted memory of a training step by part, from the table that `python -m nanochat_native.memory --table` writes.
// data-value is the peak in MiB, the sum of the parts.
"use strict";
window.GUIDE_WIDGETS = window.GUIDE_WIDGETS || {};
window.GUIDE_WIDGETS["memory"] = function (element, table) {
  const { make, choice, button } = window.GUIDE;
  if (!table) { element.append(make("p", {}, "The table of predictions is missing.")); return; }
  const names = Object.keys(table.grid);
  const labels = { depth: "Depth", device_batch_size: "Rows a micro-batch", max_seq_len: "Sequence length T", nproc: "Ranks", grad_checkpoint: "Gradient checkpointing", optimizer: "Optimizer" };
  const texts = { grad_checkpoint: ["off", "on"], optimizer: table.grid.optimizer.map((name) => (name === "hybrid" ? "Muon and AdamW" : name === "adamw" ? "AdamW" : name)) };
  const state = { depth: 20, device_batch_size: 16, max_seq_len: 2048, nproc: 1, grad_checkpoint: 0, optimizer: 0 };
  const parts = table.columns.slice(names.length + 1);
  const colors = { weights: "--blue", "optimizer state": "--purple", gradients: "--orange", activations: "--green", "weights in bfloat16": "--yellow" };
  let kept = null;
  const bars = make("div"), readout = make("p", { class: "readout", role: "status" });
  const fields = names.map((name) => {
    const options = table.grid[name].map((value, index) => [index, (texts[name] || table.grid[name])[index]]);
    const indexed = name in texts;
    const start = indexed ? state[name] : table.grid[name].indexOf(state[name]);
    return choice(labels[name] || name, options, start, (index) => { state[name] = indexed ? Number(index) : table.grid[name][index]; draw(); });
  });
  const keep = button("Keep for comparison", () => { kept = kept ? null : { row: row(), text: describe() }; draw(); });
  element.append(make("div", { class: "controls" }, ...fields, keep), bars, readout);

  /** Return the row of the chosen point: the rows are the product of the lists, and the last list varies fastest. */
  function row() {
    let index = 0;
    for (const name of names) index = index * table.grid[name].length + (name in texts ? state[name] : table.grid[name].indexOf(state[name]));
    return table.rows[index];
  }
  const describe = () => "d" + state.depth + ", " + state.device_batch_size + " × " + state.max_seq_len + ", " + state.nproc + (state.nproc === 1 ? " rank, " : " ranks, ") + (state.grad_checkpoint ? "checkpointing, " : "") + texts.optimizer[state.optimizer];
  const sizes = (found) => found.slice(names.length + 1);
  const peak = (found) => sizes(found).reduce((a, b) => a + b, 0);
  const show = (mebibytes) => (mebibytes < 1024 ? mebibytes + " MiB" : (mebibytes / 1024).toFixed(mebibytes < 10240 ? 2 : 1) + " GiB");

  /** Return one stacked bar with its label; `scale` is the size of the whole width. */
  function stack(found, text, scale) {
    const pieces = sizes(found).map((size, index) => size && make("span", { title: parts[index] + ": " + show(size), style: "width:" + 100 * size / scale + "%;background:var(" + (colors[parts[index]] || "--gray") + ")" }));
    return make("div", { style: "margin-bottom:.8rem" }, make("div", {}, text + ": ", make("b", {}, show(peak(found)))),
      make("div", { style: "display:flex;height:1.5rem;background:var(--soft);border-radius:4px;overflow:hidden" }, ...pieces.filter(Boolean)));
  }

  function draw() {
    const found = row(), largest = Math.max(peak(found), kept ? peak(kept.row) : 0);
    const most = Math.max(...sizes(found), ...(kept ? sizes(kept.row) : []));
    const line = (size, color, height) => make("div", { style: "height:" + height + ";width:" + Math.max(0.3, 100 * size / most) + "%;background:var(" + color + ");border-radius:2px" });
    const lines = parts.map((part, index) => {
      const size = sizes(found)[index], other = kept ? sizes(kept.row)[index] : 0;
      if (!size && !other) return null;
      return make("tr", {}, make("td", { style: "white-space:nowrap" }, part), make("td", { style: "text-align:right;white-space:nowrap" }, show(size)),
        make("td", { style: "width:60%" }, line(size, colors[part] || "--gray", ".8rem"), kept ? line(other, "--line", ".35rem") : ""));
    });
    const list = make("table", { style: "display:table;width:100%" }, make("tbody", {}, ...lines));
    bars.replaceChildren(stack(found, describe(), largest), kept ? stack(kept.row, "Kept: " + kept.text, largest) : "", list);
    keep.textContent = kept ? "Forget the kept one" : "Keep for comparison";
    const ratio = kept ? " The kept one needs " + (peak(kept.row) / peak(found)).toFixed(2) + " times as much." : "";
    readout.textContent = "Predicted peak of one rank: " + show(peak(found)) + ", in the phase “" + table.phases[found[names.length]] + "”." + ratio;
    element.dataset.value = peak(found);
  }
  draw();
};
