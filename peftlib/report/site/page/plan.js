"use strict";
// The planner's table, loaded after the rest of the page. Hours are proportional to the rows; nothing else is computed.
(() => {
  const { $, el, number, options, labelled, load, missing } = peftlib;

  const two = (value) => Number(value.toPrecision(2));
  function time(seconds) {
    const [size, unit] = [[3600, "h"], [60, "min"], [1, "s"]].find(([size]) => seconds >= size || size === 1);
    return [String(Math.max(1, two(seconds / size))), unit];
  }
  /** Formats like train/estimate.duration. */
  function duration(low, high) {
    const [from, to] = [time(low), time(high)];
    if (from.join() === to.join()) return `about ${from.join(" ")}`;
    return from[1] === to[1] ? `${from[0]} to ${to.join(" ")}` : `${from.join(" ")} to ${to.join(" ")}`;
  }

  async function make() {
    const plan = await load("plan"), pairs = (names) => names.map((name) => [String(name), name.toLocaleString("en-US")]);
    const card = options(el("select", { id: "card" }), pairs(Object.keys(plan.cards)), "t4");
    const model = options(el("select", { id: "model" }), pairs(Object.keys(plan.models)), "gemma-3-1b");
    const length = options(el("select", { id: "length" }), pairs(plan.lengths), String(plan.max_length));
    const rows = el("input", { id: "rows", type: "number", min: 1, step: 1, value: plan.rows });
    const table = el("table", { id: "plans" }), said = el("output"), settings = el("pre", { id: "settings", tabIndex: 0, role: "region", "aria-label": "Settings to copy" });
    const copy = el("button", { type: "button", textContent: "Copy", onclick: async () => {
      try { await navigator.clipboard.writeText(settings.textContent); } catch { getSelection().selectAllChildren(settings); return; }
      copy.textContent = "Copied";
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    } });

    function line(name, entry, gib, share) {
      const [memory, refused, micro, recompute, slow, fast, low, high, measured] = entry, fits = !refused;
      const fill = el("span");
      fill.style.width = `${Math.min(100, (100 * memory) / gib)}%`;
      const speed = !fits ? "" : [...new Set([two(slow), two(fast)].map((value) => number(value, 0)))].join(" to ");
      return el("tr", { className: fits ? "" : "no" }, el("th", { scope: "row" }, name), el("td", {}, fits ? "yes" : "no"),
        el("td", { className: "number" }, memory ? number(memory, 2) : "", el("span", { className: "meter", "aria-hidden": "true" }, fill)),
        el("td", { className: "number" }, fits ? String(micro) : ""), el("td", {}, recompute ?? ""), el("td", { className: "number" }, speed),
        el("td", { className: "number" }, fits ? duration(low * share, high * share) : ""), el("td", {}, fits ? (measured ? "measured speed" : "estimate") : refused));
    }

    function show() {
      const chosen = plan.cards[card.value], n = Math.floor(Number(rows.value)), isNumber = n >= 1 && n <= 1e7;
      rows.setCustomValidity(isNumber ? "" : "a whole number from 1 to 10,000,000");
      rows.toggleAttribute("aria-invalid", !isNumber);
      if (!isNumber) { said.textContent = "Training rows: a whole number from 1 to 10,000,000."; return; }
      const costs = plan.table[card.value][model.value][plan.lengths.indexOf(Number(length.value))];
      const fitting = plan.methods.filter((_, at) => !costs[at][1]);
      said.textContent = `${fitting.length} of ${plan.methods.length} methods fit ${number(chosen.gib, 1)} GiB in ${chosen.precision}.`;
      const head = [["method"], ["fits"], ["memory", `of ${number(chosen.gib, 1)} GiB`], ["micro-batch"], ["recompute"], ["tokens/s"], ["time", "of one run"], ["basis"]];
      table.replaceChildren(el("thead", {}, el("tr", {}, ...head.map(([name, unit], at) => el("th", { scope: "col", className: [2, 3, 5, 6].includes(at) ? "number" : "" }, name, unit ? el("small", {}, unit) : null)))),
        el("tbody", {}, ...plan.methods.map((name, at) => line(name, costs[at], chosen.gib, n / plan.rows))));
      const given = { model: plan.models[model.value], train_rows: n, max_length: Number(length.value) };
      const profile = chosen.precision === "fp16" ? "t4" : "gpu";
      const lines = Object.entries({ profile, ...given }).map(([name, value]) => `${name} = ${JSON.stringify(value)}`);
      const words = Object.entries(given).map(([name, value]) => `-p ${name}=${value}`).join(" ");
      settings.textContent = [...lines, "", "# or run this command:", `peftlib run --profile ${profile} --study mine ${words}`].join("\n");
    }
    for (const control of [card, model, length, rows]) control.addEventListener("input", show);
    $("planner").append(el("div", { className: "controls" }, labelled("GPU", card), labelled("Model", model), labelled("Longest row, tokens", length), labelled(`Training rows of each of ${plan.sources} sources`, rows), said),
      el("div", { className: "scroller", role: "region", "aria-label": "What fits", tabIndex: 0 }, table),
      el("p", { className: "quiet" }, "Times range from rows of a fifth of the maximum length to rows that all have the maximum; answering the test rows takes extra time. For other adapters use peftlib plan --methods."),
      el("h3", {}, "Settings"), settings, copy);
    show();
  }

  peftlib.startPlan = () => setTimeout(() => make().catch(missing), 0);
})();
