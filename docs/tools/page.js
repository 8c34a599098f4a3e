// The behavior of the guide's pages: menu, light and dark, keys, search, copy buttons, exercise fields, widgets.
//
// Plain scripts only, because a page opened from a file may neither fetch nor load modules. What a page may load before
// this script: search.js (window.SEARCH), exercises.js (window.EXERCISES), widget-data.js (window.WIDGET_DATA) and
// widgets/NAME.js (window.GUIDE_WIDGETS[NAME]).
"use strict";
(function () {
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const root = document.documentElement;
  const storage = {
    get(key) { try { return localStorage.getItem(key); } catch (error) { return null; } },
    set(key, value) { try { localStorage.setItem(key, value); } catch (error) { /* no storage on this page */ } },
  };

  /** Return a new element. Attributes that are functions are event listeners; children are nodes or texts. */
  function make(tag, attributes = {}, ...children) {
    const svg = ["svg", "g", "path", "line", "rect", "circle", "text", "polyline", "title", "tspan", "polygon"].includes(tag);
    const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (typeof value === "function") element.addEventListener(name, value);
      else if (value === true) element.setAttribute(name, "");
      else if (value !== false && value !== undefined && value !== null) element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  // --- menu ---
  const menu = $("#ui-menu");
  const chapters = $("#ui-chapters");
  const current = $("a[aria-current='page']", chapters);
  function openMenu(open) {
    root.classList.toggle("menu-open", open);
    menu.setAttribute("aria-expanded", String(open));
    if (open && current) current.scrollIntoView({ block: "center" });
  }
  menu.addEventListener("click", () => openMenu(!root.classList.contains("menu-open")));
  chapters.addEventListener("click", (event) => { if (event.target.closest("a")) openMenu(false); });
  if (current && current.offsetTop > chapters.clientHeight - 160) chapters.scrollTop = current.offsetTop - 160;

  // The section that is being read is marked in the menu.
  const links = new Map($$("ul ul a", chapters).map((link) => [link.getAttribute("href").split("#")[1], link]));
  const headings = $$("article h2[id]").filter((heading) => links.has(heading.id));
  let waiting = false;
  function markSection() {
    waiting = false;
    let found = null;
    for (const heading of headings) if (heading.getBoundingClientRect().top < 140) found = heading;
    for (const [id, link] of links) {
      if (found && id === found.id) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  }
  addEventListener("scroll", () => { if (!waiting) { waiting = true; requestAnimationFrame(markSection); } }, { passive: true });
  markSection();
  for (const heading of $$("article :is(h2, h3)[id]")) {
    heading.append(make("a", { class: "anchor", href: "#" + heading.id, "aria-label": "Link to this section" }, "#"));
  }

  // --- light and dark ---
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  function switchTheme() {
    root.dataset.theme = dark() ? "light" : "dark";
    storage.set("guide-theme", root.dataset.theme);
    $("#ui-theme").setAttribute("aria-pressed", String(dark()));
  }
  $("#ui-theme").setAttribute("aria-pressed", String(dark()));
  $("#ui-theme").addEventListener("click", switchTheme);

  // --- search ---
  const field = $("#ui-search");
  const results = $("#ui-results");
  let entries = null;
  let vocabulary = null;
  let chosen = -1;
  const pages = new Map($$("a", chapters).map((link) => [link.getAttribute("href").replace(/\.html.*/, ""), link.firstChild.textContent]));
  const WORD = /\d+(?:\.\d+)+|[\p{L}\p{N}_]+/gu; // numbers such as 9.2 are words, and names such as newton_schulz
  const words = (text) => text.toLowerCase().normalize("NFKD").replace(/[\u0300-\u036f]/g, "").match(WORD) || [];
  const begins = (word, asked) => word.startsWith(asked) || word.includes("_" + asked);

  /** Count the words of all entries, by word. */
  function prepare() {
    entries = (window.SEARCH || []).map((entry) => ({ ...entry, titleWords: words(entry.title) }));
    vocabulary = new Map();
    entries.forEach((entry, index) => {
      for (const word of words(entry.text)) {
        if (!vocabulary.has(word)) vocabulary.set(word, new Map());
        const counts = vocabulary.get(word);
        counts.set(index, (counts.get(index) || 0) + 1);
      }
    });
  }

  /** Return the entries with all words of the query, best first: words of titles before words of texts, whole before prefixes. */
  function find(query) {
    if (!entries) prepare();
    const asked = [...new Set(words(query))];
    if (!asked.length) return [];
    const matches = entries.map(() => []);
    for (const word of asked) {
      const text = new Float64Array(entries.length);
      for (const [other, counts] of vocabulary) {
        if (!begins(other, word)) continue;
        const weight = other === word ? 1 : 0.6 * word.length / other.length;
        for (const [index, count] of counts) text[index] += weight * (1 + Math.log(count));
      }
      const scores = entries.map((entry, index) => {
        const title = entry.titleWords.map((other) => (other === word ? 6 : begins(other, word) ? 4 * word.length / other.length : 0));
        return Math.max(0, ...title) + Math.min(text[index], 4);
      });
      const rare = Math.log(1 + entries.length / (1 + scores.filter((score) => score > 0).length));
      scores.forEach((score, index) => { if (score > 0) matches[index].push(score * rare); });
    }
    const scored = entries.map((entry, index) => ({ entry, all: matches[index].length === asked.length, score: matches[index].reduce((a, b) => a + b, 0) }));
    const some = scored.filter((item) => item.score > 0);
    const whole = some.filter((item) => item.all);
    return (whole.length ? whole : some).sort((a, b) => b.score - a.score).slice(0, 20).map((item) => item.entry);
  }

  /** Return the text as nodes, with the words that begin with an asked word marked. */
  function highlighted(text, asked) {
    const nodes = [];
    let last = 0;
    for (const match of text.matchAll(WORD)) {
      const word = words(match[0]).join("");
      if (!asked.some((one) => begins(word, one))) continue;
      nodes.push(text.slice(last, match.index), make("mark", {}, match[0]));
      last = match.index + match[0].length;
    }
    return [...nodes, text.slice(last)];
  }

  /** Return about 150 characters of the text that hold as many asked words as possible. */
  function excerpt(text, asked) {
    const hits = [...text.matchAll(WORD)].map((match) => ({ at: match.index, which: asked.findIndex((one) => begins(match[0].toLowerCase(), one)) })).filter((hit) => hit.which >= 0);
    let best = 0, most = 0;
    for (const hit of hits) {
      const kinds = new Set(hits.filter((other) => other.at >= hit.at && other.at < hit.at + 120).map((other) => other.which)).size;
      if (kinds > most) { most = kinds; best = hit.at; }
    }
    let start = best < 40 ? 0 : text.indexOf(" ", best - 40) + 1;
    if (start > best) start = best;
    const end = start + 160 >= text.length ? text.length : text.lastIndexOf(" ", start + 160);
    return (start ? "… " : "") + text.slice(start, end) + (end < text.length ? " …" : "");
  }

  function choose(index) {
    const options = $$("a", results);
    chosen = options.length ? (index + options.length) % options.length : -1;
    options.forEach((option, at) => option.setAttribute("aria-selected", String(at === chosen)));
    if (chosen >= 0) {
      options[chosen].scrollIntoView({ block: "nearest" });
      field.setAttribute("aria-activedescendant", options[chosen].id);
    } else field.removeAttribute("aria-activedescendant");
  }

  function show() {
    const asked = [...new Set(words(field.value))];
    const found = find(field.value);
    results.replaceChildren(...found.map((entry, index) =>
      make("a", { role: "option", id: "result-" + index, href: entry.page + ".html" + (entry.id ? "#" + entry.id : ""), tabindex: "-1", "aria-selected": "false", click: close },
        make("small", {}, entry.id && entry.title !== pages.get(entry.page) ? pages.get(entry.page) : ""), make("b", {}, ...highlighted(entry.title, asked)), make("span", {}, ...highlighted(excerpt(entry.text, asked), asked)))));
    if (asked.length && !found.length) results.append(make("p", {}, "Nothing found."));
    results.hidden = !asked.length;
    $("#ui-found").textContent = asked.length ? found.length + (found.length === 1 ? " result" : " results") : "";
    field.setAttribute("aria-expanded", String(!results.hidden));
    results.scrollTop = 0;
    choose(found.length ? 0 : -1);
  }
  function close() {
    results.hidden = true;
    field.setAttribute("aria-expanded", "false");
    field.removeAttribute("aria-activedescendant");
  }
  field.addEventListener("input", show);
  field.addEventListener("focus", () => { if (!entries) prepare(); if (field.value) show(); });
  field.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (results.hidden) show(); else choose(chosen + (event.key === "ArrowDown" ? 1 : -1));
    } else if (event.key === "Enter" && chosen >= 0 && !results.hidden) {
      event.preventDefault();
      const target = $$("a", results)[chosen];
      field.blur();
      target.click();
    } else if (event.key === "Escape") {
      event.preventDefault();
      if (results.hidden) { field.value = ""; field.blur(); } else close();
      event.stopPropagation();
    }
  });
  document.addEventListener("pointerdown", (event) => { if (!event.target.closest(".search")) close(); });

  // --- keys ---
  const keys = $("#ui-keys");
  const keysOn = $("#ui-keys-on");
  keysOn.checked = storage.get("guide-keys") !== "off";
  keysOn.addEventListener("change", () => storage.set("guide-keys", keysOn.checked ? "on" : "off"));
  $("#ui-help").addEventListener("click", () => keys.showModal());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && root.classList.contains("menu-open")) { openMenu(false); menu.focus(); return; }
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || keys.open || !keysOn.checked) return;
    if (event.target.closest("input, textarea, select, [contenteditable], .live-part")) return;
    const arrows = !event.target.closest("pre, table, p");  // these may scroll sideways
    const turn = (rel) => { const link = $(".turn a[rel='" + rel + "']"); if (link) link.click(); };
    if (event.key === "/") { event.preventDefault(); field.focus(); field.select(); }
    else if (event.key === "?") keys.showModal();
    else if (event.key === "d") switchTheme();
    else if (event.key === "n" || (event.key === "ArrowRight" && arrows)) turn("next");
    else if (event.key === "p" || (event.key === "ArrowLeft" && arrows)) turn("prev");
  });

  // --- copy buttons ---
  async function copy(text) {
    if (navigator.clipboard && isSecureContext) { try { await navigator.clipboard.writeText(text); return true; } catch (error) { /* the old way */ } }
    const area = make("textarea", { style: "position:fixed;opacity:0" });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
  for (const pre of $$("article pre")) {
    const outer = pre.parentElement.matches("div.sourceCode") ? pre.parentElement : pre;
    const fence = make("div", { class: "fence" });
    outer.replaceWith(fence);
    fence.append(outer);
    if (pre.classList.contains("text")) continue;
    const button = make("button", { type: "button", class: "copy", "aria-label": "Copy the code" }, "Copy");
    button.addEventListener("click", async () => {
      if (await copy(pre.textContent.replace(/\n$/, ""))) { button.textContent = "Copied"; setTimeout(() => { button.textContent = "Copy"; }, 1500); }
      else button.remove();
    });
    fence.append(button);
  }

  // Short words of code in a line, such as --depth, are not broken at their hyphens.
  for (const code of $$("article :not(pre) > code")) {
    if (code.children.length) continue;
    const parts = code.textContent.split(" ");
    if (parts.some((part) => part.length > 1)) {
      code.replaceChildren(...parts.flatMap((part, at) => [at ? " " : "", part.length < 29 ? make("span", { class: "word" }, part) : part]));
    }
  }

  // Columns of sentences stay readable beside others: a table scrolls sideways rather than making them narrow.
  for (const cell of $$("article td")) if (cell.textContent.length > 50) cell.classList.add("prose");

  // --- exercises ---
  const SUFFIXES = { "%": 0.01, k: 1e3, K: 1e3, M: 1e6, G: 1e9, B: 1e9, T: 1e12, Ki: 2 ** 10, Mi: 2 ** 20, Gi: 2 ** 30 };

  /** Return the number that a reader typed, such as 3.1e6, 3,100,000, 3.1M, 50% or 1/3, or NaN. */
  function parse(text, unit) {
    text = text.trim();
    if (unit && text.endsWith(unit)) text = text.slice(0, -unit.length).trim();
    const match = text.match(/^([^/]+?)\s*(%|[KMG]i|[kKMGBT])?(?:\/([^/]+))?$/);
    const plain = (part) => {
      part = part.trim();
      if (/^[+-]?\d{1,3}(,\d{3})+(\.\d*)?$/.test(part)) part = part.replaceAll(",", "");
      part = part.replace(/(\d)_(?=\d)/g, "$1").replace(/^−/, "-");
      return /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(part) ? Number(part) : NaN;
    };
    return match ? plain(match[1]) * (SUFFIXES[match[2]] || 1) / plain(match[3] || "1") : NaN;
  }

  /** Return the verdict on a number and a phrase about it, those of `python -m nanochat_native.guide check`. */
  function judge(value, { answer, tolerance, mistakes }) {
    const near = (target) => Math.abs(value - target) <= tolerance * (Math.abs(target) || 1);
    if (near(answer)) return ["right", "Right."];
    for (const [text, wrong] of Object.entries(mistakes || {})) if (near(wrong)) return ["mistake", "Not right: " + text + "."];
    if (answer === 0 || value === 0) return ["wrong", "Not right: it is off by " + Number(Math.abs(value - answer).toPrecision(3)) + "."];
    const ratio = value / answer;
    if (ratio < 0) return ["wrong", "Not right: the sign is wrong."];
    return ["wrong", "Not right: too " + (ratio > 1 ? "large" : "small") + " by a factor of " + Number(Math.max(ratio, 1 / ratio).toPrecision(4)) + "."];
  }
  for (const form of $$("form.check")) {
    const exercise = (window.EXERCISES || {})[form.dataset.exercise];
    if (!exercise) { form.remove(); continue; }
    const id = "answer-" + form.dataset.exercise;
    const input = make("input", { id, type: "text", autocomplete: "off", spellcheck: "false" });
    const verdict = make("output", { for: id });
    form.replaceChildren(make("label", { for: id }, "Your answer"), input, make("span", {}, exercise.unit || ""), make("button", {}, "Check"), verdict);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const value = parse(input.value, exercise.unit);
      const [kind, sentence] = Number.isFinite(value) ? judge(value, exercise) : ["wrong", "Enter a number, such as 3.1e6, 3.1M or 50%."];
      verdict.dataset.verdict = kind;
      verdict.textContent = sentence;
    });
  }

  // --- widgets ---
  window.GUIDE = {
    make,
    /** Return a labeled range field. Its label shows the value; `change` is called with each new value. */
    slider(label, { min, max, step = 1, value, format = String }, change) {
      const shown = make("b", {}, format(value));
      const input = make("input", { type: "range", min, max, step, value, "aria-valuetext": format(value) });
      input.addEventListener("input", () => {
        shown.textContent = format(Number(input.value));
        input.setAttribute("aria-valuetext", shown.textContent);
        change(Number(input.value));
      });
      return make("label", {}, make("span", {}, label + " ", shown), input);
    },
    /** Return a labeled list to choose from. Options are texts, or pairs of value and text. */
    choice(label, options, value, change) {
      const select = make("select", {}, ...options.map((option) => {
        const [key, text] = Array.isArray(option) ? option : [option, option];
        return make("option", { value: key, selected: String(key) === String(value) }, String(text));
      }));
      select.addEventListener("change", () => change(select.value));
      return make("label", {}, label, select);
    },
    /** Return the width to draw in, so that texts keep their size on a phone. */
    width: (element) => Math.max(280, Math.min(640, element.clientWidth - 36)),
    /** Return the linear map that takes a to c and b to d. */
    scale: (a, b, c, d) => (x) => c + (x - a) / (b - a) * (d - c),
    /** Return an SVG of this size with these children. The texts outside say what it shows. */
    svg: (width, height, ...children) => make("svg", { viewBox: "0 0 " + width + " " + height, "aria-hidden": "true" }, ...children),
    button: (text, press) => make("button", { type: "button", click: press }, text),
  };
  const TITLES = {
    bpe: "Merge a text of your own",
    rope: "Turn the arrows yourself",
    tiles: "Walk from tile to tile",
    "newton-schulz": "Change the coefficients, the steps and the spectrum",
    memory: "Change the sizes",
    ring: "Send step by step",
  };
  for (const element of $$(".widget[data-widget]")) {
    const name = element.dataset.widget;
    const start = (window.GUIDE_WIDGETS || {})[name];
    if (!start) continue;
    const title = TITLES[name] || name;
    const part = make("div", { class: "live-part", role: "group", "aria-label": title });
    part.append(make("p", { class: "live-title" }, title));
    element.append(part); // before it starts: a widget measures its width
    start(part, (window.WIDGET_DATA || {})[name]);
  }

  // --- paper ---
  addEventListener("beforeprint", () => { for (const details of $$("details:not([open])")) { details.open = true; details.dataset.printed = ""; } });
  addEventListener("afterprint", () => { for (const details of $$("details[data-printed]")) { details.open = false; delete details.dataset.printed; } });
})();
