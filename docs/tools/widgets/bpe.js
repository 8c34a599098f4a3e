// Byte pair encoding, merge by merge, on a text of the reader. The rules are those of nanochat_native.data.tokenizer: merges
// happen within the words of its split pattern, the most frequent pair is merged, and of equal ones that with the smallest
// ids. data-value is the number of tokens.
"use strict";
window.GUIDE_WIDGETS = window.GUIDE_WIDGETS || {};
window.GUIDE_WIDGETS["bpe"] = function (element) {
  const { make, slider, button } = window.GUIDE;
  const PATTERN = /'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+/gu;
  const START = "the cat sat on the mat, the other cat sat on the other mat";
  const LONGEST = 2000, MOST = 200;
  const COLORS = ["--blue", "--orange", "--green", "--purple", "--yellow"];
  let trained = null, merges = 0;
  const text = make("textarea", { rows: 3, maxlength: LONGEST, spellcheck: "false" });
  text.value = START;
  const tokens = make("p", { style: "font: .95rem/2.1 var(--mono); overflow-wrap: anywhere; margin: 0 0 .6rem; max-height: 16rem; overflow-y: auto" });
  const readout = make("p", { class: "readout", role: "status" });
  const count = slider("Merges", { min: 0, max: 1, value: 0 }, (value) => { merges = value; draw(); });
  const input = count.querySelector("input");
  const move = (by) => { input.value = merges + by; input.dispatchEvent(new Event("input")); };
  const back = button("Back", () => move(-1)), next = button("Merge", () => move(1));
  text.addEventListener("input", () => { merges = 0; start(); });
  element.append(make("div", { class: "controls" }, make("label", { class: "full" }, "Your text", text), count, make("div", { class: "row" }, back, next)), tokens, readout);

  /** Return the list of words after each merge, with the pairs that were merged. */
  function train(source) {
    const encoder = new TextEncoder();
    let words = (source.match(PATTERN) || []).map((word) => [...encoder.encode(word)]);
    const bytes = Array.from({ length: 256 }, (_, byte) => [byte]);
    const steps = [{ words, pair: null }];
    while (steps.length <= MOST) {
      const counts = new Map();
      for (const word of words) {
        for (let i = 0; i + 1 < word.length; i++) {
          const key = word[i] * 65536 + word[i + 1];
          counts.set(key, (counts.get(key) || 0) + 1);
        }
      }
      let best = -1, most = 0;
      for (const [key, times] of counts) if (times > most || (times === most && key < best)) { best = key; most = times; }
      if (best < 0) break;
      const left = Math.floor(best / 65536), right = best % 65536, id = bytes.length;
      bytes.push([...bytes[left], ...bytes[right]]);
      words = words.map((word) => {
        const merged = [];
        for (let i = 0; i < word.length; i++) {
          if (i + 1 < word.length && word[i] === left && word[i + 1] === right) { merged.push(id); i++; } else merged.push(word[i]);
        }
        return merged;
      });
      steps.push({ words, left, right, id, times: most });
    }
    return { steps, bytes };
  }

  /** Return the characters of a token; a part of a character is shown as the hexadecimal numbers of its bytes. */
  function spell(id) {
    try {
      return new TextDecoder("utf-8", { fatal: true }).decode(new Uint8Array(trained.bytes[id])).replaceAll("\n", "⏎").replaceAll(" ", "␣").replaceAll("\t", "⇥");
    } catch (error) {
      return "‹" + trained.bytes[id].map((byte) => byte.toString(16).padStart(2, "0")).join(" ") + "›";
    }
  }

  function start() {
    trained = train(text.value);
    input.max = trained.steps.length - 1;
    input.value = merges;
    input.dispatchEvent(new Event("input"));
  }

  function draw() {
    merges = Math.max(0, Math.min(merges, trained.steps.length - 1));
    const step = trained.steps[merges], coming = trained.steps[merges + 1];
    const all = step.words.flat();
    const span = (id, at) => {
      const isNew = merges > 0 && id === step.id;
      const color = id < 256 ? "var(--line)" : "var(" + COLORS[id % COLORS.length] + ")";
      return make("span", { style: "padding: .12em .3em; margin-right: 2px; border-radius: 4px; border-bottom: 3px solid " + color + ";" + (isNew ? "background: var(--mark);" : "background: var(--soft);"), "data-at": at }, spell(id));
    };
    tokens.replaceChildren(...all.flatMap((id, at) => [span(id, at), "\u200b"]));
    const bytes = trained.steps[0].words.flat().length;
    const parts = [make("b", {}, String(all.length)), " tokens for " + bytes + " bytes: ", make("b", {}, all.length ? (bytes / all.length).toFixed(2) : "0"), " bytes a token. "];
    if (merges) parts.push("Merge " + merges + " joined “" + spell(step.left) + "” and “" + spell(step.right) + "”, which occurred " + step.times + (step.times === 1 ? " time" : " times") + ", into token " + step.id + ". ");
    if (coming) parts.push("Next: “" + spell(coming.left) + "” and “" + spell(coming.right) + "”, " + coming.times + (coming.times === 1 ? " time." : " times."));
    else parts.push(trained.steps.length > MOST ? "This page stops after " + MOST + " merges." : "No pair is left: every word is one token.");
    readout.replaceChildren(...parts);
    back.disabled = merges === 0;
    next.disabled = !coming;
    element.dataset.value = all.length;
  }
  start();
};
