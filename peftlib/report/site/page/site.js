"use strict";
// Study data are added to the page as text nodes, never as markup: only `el` creates elements.
const peftlib = (() => {
  const kept = new Map(), waiting = new Map();
  const $ = (id) => document.getElementById(id);

  /** Called by the files of data/. */
  function take(name, value) { kept.set(name, value); }

  /** Load a script of the page's folder once. */
  function script(path) {
    if (!waiting.has(path)) {
      waiting.set(path, new Promise((resolve, reject) => {
        document.head.append(el("script", { src: path, onload: resolve, onerror: () => { waiting.delete(path); reject(new Error(`${path} is missing`)); } }));
      }));
    }
    return waiting.get(path);
  }

  /** Show that a file is missing; a file:// page gets no event for an unhandled rejection. */
  function missing(error) { $("about").textContent = `${error.message}: copy the whole folder, then reload this page.`; }

  /** The value of data/NAME.js, loaded on first use. */
  async function load(name) {
    if (!kept.has(name)) await script(`data/${name}.js`);
    return kept.get(name);
  }

  function el(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name in made) made[name] = value;
      else if (value !== null) made.setAttribute(name, value);
    }
    made.append(...children.filter((child) => child !== null));
    return made;
  }

  function number(value, digits) {
    if (value === null || value === undefined) return "";
    if (digits === null) return String(Number(value.toPrecision(3)));
    return value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  }

  function options(select, pairs, chosen) {
    select.replaceChildren(...pairs.map(([value, label]) => el("option", { value, textContent: label, selected: value === chosen })));
    return select;
  }

  function labelled(text, control) { return el("label", {}, text, control); }

  function save(name, content, type) {
    const url = content.startsWith("data:") ? content : URL.createObjectURL(new Blob([content], { type }));
    el("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  /** CSV of [[cell, ...], ...]: all cells quoted and escaped against formulas (OWASP's apostrophe). */
  function csv(rows) {
    const cell = (value) => {
      let text = value === null || value === undefined ? "" : String(value);
      if (typeof value === "string" && /^[=+\-@\t\r\n]/.test(text)) text = `'${text}`;
      return `"${text.replaceAll('"', '""')}"`;
    };
    return rows.map((row) => `${row.map(cell).join(",")}\n`).join("");
  }

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
  const color = (method) => data().methods[method][isDark() ? 1 : 0];
  const swatch = (method) => {
    const made = el("span", { className: "swatch", "aria-hidden": "true" });
    made.style.background = color(method);
    return made;
  };
  const data = () => kept.get("runs");
  const figure = (key) => data().figures.find((one) => one.key === key);
  const mean = (values) => {
    const known = values.filter((value) => value !== null && value !== undefined);
    return known.length && known.length === values.length ? known.reduce((a, b) => a + b) / known.length : null;
  };

  // ---- the table of runs ----
  const WORDS = [["study", "study"], ["method", "method"], ["seed", "seed"], ["status", "status"], ["precision", "precision"], ["device", "device"]];
  const state = { sort: null, descending: true, hidden: new Set(["precision", "device", "trainable_params", "train_loss", "steps", "learning_rate", "n_test"]) };
  let shown = [];

  function columns() {
    const words = WORDS.map(([key, label]) => ({ key, label, unit: "", isText: key !== "seed" }));
    return [...words, ...data().figures];
  }

  function find() {
    const wanted = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean), study = $("study").value;
    const holds = (run) => {
      const text = WORDS.map(([key]) => run[key] ?? "").join(" ").toLowerCase();
      return (!study || run.study === study) && wanted.every((word) => text.includes(word));
    };
    shown = data().runs.filter(holds);
    const { sort, descending } = state;
    if (sort) {
      const known = (run) => run[sort] !== null && run[sort] !== undefined;
      const order = (a, b) => (a[sort] < b[sort] ? -1 : a[sort] > b[sort] ? 1 : 0) * (descending ? -1 : 1);
      shown.sort((a, b) => known(b) - known(a) || (known(a) ? order(a, b) : 0));  // unknown values last in both directions
    }
    $("count").textContent = `${shown.length} of ${data().runs.length} runs`;
  }

  function table() {
    const visible = columns().filter((column) => !state.hidden.has(column.key));
    const head = visible.map((column) => {
      const is = state.sort === column.key;
      const button = el("button", { type: "button", onclick: () => sortBy(column) }, column.label);
      const th = el("th", { scope: "col", className: column.isText ? "" : "number" }, button, column.unit ? el("small", {}, column.unit) : null);
      if (is) th.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
      return th;
    });
    const body = shown.map((run) => el("tr", {}, ...visible.map((column) => {
      const value = run[column.key];
      if (column.key === "method") return el("th", { scope: "row" }, swatch(value), el("bdi", {}, value));
      if (column.isText) return el("td", {}, el("bdi", {}, value ?? ""));
      return el("td", { className: "number" }, number(value, column.digits ?? (column.key === "seed" ? 0 : null)));
    })));
    $("table").replaceChildren(el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body));
  }

  function sortBy(column) {
    if (state.sort === column.key) state.descending = !state.descending;
    else Object.assign(state, { sort: column.key, descending: !column.isText && column.better !== -1 && column.key !== "seed" });
    find();
    table();
    [...$("table").querySelectorAll("th button")].find((button) => button.textContent === column.label).focus();
  }

  let pending = 0;
  function redraw() {
    clearTimeout(pending);
    pending = setTimeout(() => peftlib.drawCharts().catch(missing), 200);
  }
  function refresh() { find(); table(); redraw(); }

  function themed() {
    $("theme").textContent = isDark() ? "Light" : "Dark";
    $("theme").setAttribute("aria-label", `Show the page ${isDark() ? "light" : "dark"}`);
    table();
    redraw();
    peftlib.explorer.show();
  }

  function start() {
    if (!data()) { $("about").textContent = "data/runs.js is missing beside this page: copy the whole folder."; return; }
    const studies = data().studies, names = studies.map((study) => study.name);
    document.title = `Results of ${names.join(", ")}`;
    document.querySelector("h1").textContent = document.title;
    const facts = [...new Set(studies.flatMap((study) => study.models)), ...(studies[0].n_test === null ? [] : [`${number(studies[0].n_test, 0)} test rows`]),
      ...new Set(studies.flatMap((study) => study.devices))];
    $("about").textContent = facts.join(" · ");
    $("made").textContent = `Made by peftlib ${data().version}. Intervals are 95 % intervals over test rows and seeds if the study has them, otherwise the range over seeds.`;
    options($("study"), [["", "all"], ...names.map((name) => [name, name])], "");
    $("study-label").hidden = names.length < 2;
    if (names.length < 2) state.hidden.add("study");
    if (data().runs.every((run) => run.status === "ok")) state.hidden.add("status");
    $("columns").append(...columns().map((column) => el("label", {}, el("input", {
      type: "checkbox", checked: !state.hidden.has(column.key),
      onchange(event) { state.hidden[event.target.checked ? "delete" : "add"](column.key); table(); },
    }), column.label)));
    const notes = studies.flatMap((study) => study.notes.map((note) => (names.length > 1 ? `${study.name}: ${note}` : note)));
    $("notes").hidden = !notes.length;
    $("notes").querySelector("ul").append(...notes.map((note) => el("li", {}, note)));
    for (const id of ["filter", "study"]) $(id).addEventListener("input", refresh);
    $("runs-csv").onclick = () => {
      const all = columns();
      save("runs.csv", csv([all.map((column) => column.key), ...shown.map((run) => all.map((column) => run[column.key]))]), "text/csv");
    };
    addEventListener("keydown", (event) => {
      const menu = document.querySelector(".menu[open]");
      if (event.key === "Escape" && menu) { menu.open = false; menu.querySelector("summary").focus(); }
    });
    try { document.documentElement.dataset.theme = localStorage.getItem("peftlib-theme") || ""; } catch { /* no storage */ }
    $("theme").onclick = () => {
      const theme = isDark() ? "light" : "dark";
      document.documentElement.dataset.theme = theme;
      try { localStorage.setItem("peftlib-theme", theme); } catch { /* no storage: for this visit */ }
      themed();
    };
    dark.addEventListener("change", themed);
    find();
    peftlib.prepareCharts();
    peftlib.explorer.start();
    themed();
    peftlib.startPlan();
    const sections = [...document.querySelectorAll("section:not([hidden])")];
    document.querySelector("nav").append(...sections.map((section) => el("a", { href: `#${section.id}` }, section.dataset.title)));
    performance.mark("peftlib-table");
  }
  document.addEventListener("DOMContentLoaded", start);
  return { $, take, script, missing, load, el, number, options, labelled, save, csv, isDark, color, swatch, data, figure, mean, shown: () => shown };
})();
