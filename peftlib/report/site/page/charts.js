"use strict";
// Vega-Lite charts of the filtered runs. Each has alt text, and its numbers as CSV.
(() => {
  const { $, el, number, options, save, csv, isDark, color, data, figure, mean, shown } = peftlib;
  const AGAINST = ["peak_memory_gib", "tokens_per_second", "forgetting", "hours"];
  const title = ({ label, unit }) => (unit ? `${label} (${unit})` : label);
  const several = () => data().studies.length > 1;
  const ENTRY = (at) => (several() ? `${at.study}: ${at.method}` : at.method);

  /** [{study, method, runs}, ...] of the shown and finished runs, in the study's order. */
  function groups() {
    const found = new Map();
    for (const run of data().runs.filter((run) => shown().includes(run) && run.status === "ok")) {
      const key = `${run.study}\n${run.method}`;
      if (!found.has(key)) found.set(key, { study: run.study, method: run.method, runs: [] });
      found.get(key).runs.push(run);
    }
    const all = ({ study, method }) => data().runs.filter((run) => run.study === study && run.method === method && run.status === "ok");
    return [...found.values()].map((group) => ({ ...group, isWhole: group.runs.length === all(group).length }));
  }

  /** A group's value of a figure: the study's interval if the filter keeps all seeds, else their mean and range. */
  function valueOf(group, key, source) {
    const is = (one) => one.study === group.study && one.method === group.method && one.key === key;
    const entry = !group.isWhole ? null : source === undefined ? data().intervals.find(is) : data().sources.find((one) => is(one) && one.source === source);
    if (entry) return { value: entry.value, low: entry.low ?? entry.value, high: entry.high ?? entry.value };
    const of = source === undefined ? group.runs.map((run) => run[key]) : [];
    const values = key.startsWith("bench_") ? of.filter((value) => value !== null && value !== undefined) : of, value = mean(values); // not every seed is scored
    if (value === null) return null;
    return { value, low: Math.min(...values), high: Math.max(...values) };
  }

  function encodings(methods) {
    const domain = [...new Set(methods)];
    return {
      color: { field: "method", type: "nominal", legend: null, scale: { domain, range: domain.map(color) } },
      shape: { field: "method", type: "nominal", legend: null, scale: { domain, range: domain.map((method) => data().methods[method][2]) } },
    };
  }

  function look() {
    const [ink, quiet, line, paper] = isDark() ? ["#e4e6e8", "#a3abb3", "#363b41", "#16181b"] : ["#1d2024", "#575e66", "#d9dcdf", "#ffffff"];
    const axis = { labelColor: quiet, titleColor: quiet, gridColor: line, domainColor: line, tickColor: line, titleFontWeight: "normal", labelFontSize: 12, titleFontSize: 12 };
    return {
      aria: false, background: paper, font: "system-ui, sans-serif", axis, axisQuantitative: { tickCount: 6 }, view: { stroke: null }, text: { color: ink },
      legend: { labelColor: ink, title: null, orient: "top", labelFontSize: 12 },
    };
  }

  function tip(handler, event, item, value) {
    const box = $("tip");
    box.hidden = !value;
    if (!value) return;
    box.textContent = Object.entries(value).map(([name, text]) => `${name}: ${text}`).join("\n");
    box.style.left = `${Math.min(event.clientX + 12, innerWidth - box.offsetWidth - 8)}px`;
    box.style.top = `${event.clientY + 14}px`;
  }

  const turns = {}, views = {};
  /** Draw a Vega-Lite spec into a figure. words: its alt text. rows: [[cell, ...], ...] of its CSV, header first. */
  async function draw(id, spec, words, rows) {
    const place = $(id);
    if (!place.firstChild) place.append(el("div", { className: "chart" }), el("figcaption"));
    const [box, caption] = place.children;
    place.closest("section").hidden = rows.length < 2;
    if (rows.length < 2) return;
    const turn = turns[id] = (turns[id] ?? 0) + 1;
    await peftlib.script("vega.js");
    if (turns[id] !== turn) return;  // a newer request replaced this one
    views[id]?.finalize();
    const sized = { width: "container", height: 320, autosize: { type: "fit", contains: "padding" }, ...spec };
    // Interpreted (ast), because the page's security policy forbids eval.
    const { view } = await window.vegaEmbed(box, { $schema: "https://vega.github.io/schema/vega-lite/v5.json", ...sized },
      { ast: true, renderer: "svg", actions: false, defaultStyle: false, config: look(), tooltip: tip });
    views[id] = view;
    for (const [name, value] of [["role", "img"], ["aria-label", words]]) box.setAttribute(name, value);  // Vega sets its own
    box.querySelector("svg").setAttribute("aria-hidden", "true");
    const file = (kind, make) => el("button", { type: "button", textContent: kind, title: `Save this chart as ${kind}`, onclick: async () => save(`${id}.${kind.toLowerCase()}`, ...(await make())) });
    caption.replaceChildren(el("details", {}, el("summary", {}, "In words"), el("p", {}, words)),
      file("SVG", async () => [await view.toSVG(), "image/svg+xml"]),
      file("PNG", async () => [await view.toImageURL("png", 2), "image/png"]),
      file("CSV", async () => [csv(rows), "text/csv"]));
    place.dataset.drawn = String(Number(place.dataset.drawn ?? 0) + 1);
  }

  function interval(at, of) {
    return at.low === at.high ? number(at.value, of.digits) : `${number(at.value, of.digits)} (${number(at.low, of.digits)} to ${number(at.high, of.digits)})`;
  }

  function pareto() {
    const [x, y] = [figure($("pareto-x").value), figure($("pareto-y").value)];
    const points = groups().flatMap((group) => {
      const [across, up] = [valueOf(group, x.key), valueOf(group, y.key)];
      return across && up && group.method !== "base" ? [{ ...group, runs: group.runs.length, name: ENTRY(group), x: across.value, ...up, across, up }] : [];
    });
    const good = (of) => of.better || 1;
    const beats = (a, b) => (a.x - b.x) * good(x) >= 0 && (a.value - b.value) * good(y) >= 0 && (a.x !== b.x || a.value !== b.value);
    const front = points.filter((point) => !points.some((other) => beats(other, point))).sort((a, b) => a.x - b.x);
    const values = points.map((point) => ({ ...point, [title(x)]: interval(point.across, x), [title(y)]: interval(point.up, y) }));
    const base = groups().filter((group) => group.method === "base").map((group) => [ENTRY(group), valueOf(group, y.key)]).filter(([, at]) => at);
    const way = { 1: "more is better", "-1": "less is better", 0: "" };
    const spec = {
      data: { values },
      encoding: { x: { field: "x", type: "quantitative", scale: { zero: false, padding: 50 }, title: `${title(x)}, ${way[x.better]}` } },
      layer: [
        { data: { values: front }, mark: { type: "line", strokeDash: [4, 4], color: isDark() ? "#a3abb3" : "#575e66", strokeWidth: 1 }, encoding: { y: { field: "value", type: "quantitative" } } },
        { mark: { type: "rule", strokeWidth: 1.5 }, encoding: { y: { field: "low", type: "quantitative", scale: { zero: false }, title: `${title(y)}, ${way[y.better]}` }, y2: { field: "high" }, color: encodings(points.map((p) => p.method)).color } },
        { mark: { type: "point", filled: true, size: 110, opacity: 1 }, encoding: { y: { field: "value", type: "quantitative" }, ...encodings(points.map((p) => p.method)), tooltip: ["name", title(y), title(x)].map((field) => ({ field: field.replaceAll(".", "\\.").replaceAll("[", "\\[").replaceAll("]", "\\]"), type: "nominal", title: field })) } },
        { mark: { type: "text", align: "left", dx: 9, dy: -7, fontSize: 12 }, encoding: { y: { field: "value", type: "quantitative" }, text: { field: "name" } } },
      ],
    };
    const said = points.map((p) => `${p.name} ${interval(p.up, y)} at ${number(p.x, x.digits)}${x.unit && ` ${x.unit}`}`);
    const words = `${y.label} against ${x.label}: ${said.join("; ")}. Pareto front: ${front.map((p) => p.name).join(", ")}.`
      + base.map(([name, at]) => ` ${name}: ${number(at.value, y.digits)}.`).join("");
    return draw("pareto", spec, words, [["study", "method", x.key, y.key, "low", "high", "unbeaten"], ...points.map((p) => [p.study, p.method, p.x, p.value, p.low, p.high, front.includes(p) ? "yes" : "no"])]);
  }

  function loss() {
    const column = $("raw").checked ? 1 : 2;
    const runs = shown().filter((run) => run.curve.length || run.valid.length);
    const name = (run) => `${ENTRY(run)}, seed ${run.seed}`;
    const rows = (run, points, what, at) => points.map((point) => ({ run: name(run), study: run.study, method: run.method, step: point[0], loss: point[at], what }));
    const values = runs.flatMap((run) => [...rows(run, run.curve, "training", column), ...rows(run, run.valid, "validation", 1)]);
    const coded = encodings(runs.map((run) => run.method));
    const spec = {
      data: { values },
      encoding: {
        x: { field: "step", type: "quantitative", title: "optimizer step" },
        y: { field: "loss", type: "quantitative", scale: { zero: false }, title: "loss (nats per assistant token)" },
        color: { ...coded.color, legend: {} },
      },
      layer: [
        { transform: [{ filter: "datum.what === 'training'" }], mark: { type: "line", strokeWidth: 1.4, opacity: 0.85 }, encoding: { detail: { field: "run" }, ...(several() ? { strokeDash: { field: "study", type: "nominal", legend: {} } } : {}) } },
        { transform: [{ filter: "datum.what === 'validation'" }], mark: { type: "point", filled: true, size: 40, opacity: 1 }, encoding: { shape: coded.shape, tooltip: [{ field: "run" }, { field: "step" }, { field: "loss", format: ".3f" }] } },
      ],
    };
    const ends = runs.map((run) => [name(run), run.curve[0]?.[column], run.curve.at(-1)?.[column]]).filter(([, first]) => first !== undefined);
    const some = ends.length > 8 ? [ends[0], ends.at(-1)] : ends;
    const words = `Lines: training loss of ${runs.length} runs${column === 2 ? ", smoothed" : ""}; points: validation rows. ${some.map(([of, first, last]) => `${of}: ${number(first, 2)} to ${number(last, 2)}`).join("; ")}.`;
    return draw("loss", spec, words, [["run", "step", "loss", "rows"], ...values.map((v) => [v.run, v.step, v.loss, v.what])]);
  }

  function bars(id, values, of, across, chance) {
    const coded = encodings(values.map((v) => v.method));
    const width = across ? { xOffset: { field: "name", sort: null } } : {};
    const spec = {
      data: { values: values.map((v) => ({ ...v, said: interval(v, of) })) },
      encoding: { x: { field: across ? "source" : "name", type: "nominal", sort: null, title: null, axis: { labelAngle: across || values.length < 7 ? 0 : -30 } }, ...width },
      layer: [
        { mark: { type: "bar", cornerRadiusEnd: 2, ...(across ? {} : { width: { band: 0.5 } }) }, encoding: { y: { field: "value", type: "quantitative", title: title(of) }, color: { ...coded.color, legend: across ? {} : null }, tooltip: [{ field: "source" }, { field: "name" }, { field: "said", title: of.label }].slice(across ? 0 : 1) } },
        { transform: [{ filter: "datum.low !== datum.high" }], mark: { type: "rule", strokeWidth: 1.5, color: isDark() ? "#e4e6e8" : "#1d2024" }, encoding: { y: { field: "low", type: "quantitative" }, y2: { field: "high" } } },
        ...(chance ? [{ data: { values: [{ chance }] }, mark: { type: "rule", strokeDash: [4, 4], color: isDark() ? "#a3abb3" : "#575e66" }, encoding: { x: null, y: { field: "chance", type: "quantitative" } } }] : []),
      ],
    };
    const said = values.map((v) => `${across ? `${v.source}, ` : ""}${v.name} ${interval(v, of)}`);
    return draw(id, spec, `${of.label}: ${said.join("; ")}.${chance ? ` Dashed: ${number(chance, 3)}, the score of guessing.` : ""}`, [["source", "study", "method", of.key, "low", "high"], ...values.map((v) => [v.source, v.study, v.method, v.value, v.low, v.high])]);
  }

  const barsOf = (key, source) => groups().flatMap((group) => {
    const found = valueOf(group, key, source);
    return found ? [{ source: source ?? "all", study: group.study, method: group.method, name: ENTRY(group), ...found }] : [];
  });

  function sources() {
    const of = figure($("source-score").value), names = [...new Set(data().sources.map((one) => one.source))];
    return of && bars("source-bars", names.flatMap((source) => barsOf(of.key, source)), of, true);
  }

  function benchmarks() {
    const of = figure($("bench-score").value);
    const chances = data().runs.map((run) => run.benchmarks[of?.key.slice("bench_".length)]?.chance);
    return of && bars("bench-bars", barsOf(of.key), of, false, chances.find(Boolean));
  }

  /** The models between base (0) and tuned (1), mean over seeds. */
  function rewind() {
    const choice = $("rewind-score"), of = { label: choice.selectedOptions[0].textContent, unit: choice.value.endsWith("_loss") ? "nats/token" : "", digits: 3 };
    const known = groups().map((group) => data().rewound.find((one) => one.study === group.study && one.method === group.method));
    const values = known.filter(Boolean).flatMap((one) => one.points.map((point) => ({ name: ENTRY(one), method: one.method, factor: point.factor, value: point[choice.value] })))
      .filter((point) => Number.isFinite(point.value));
    const coded = encodings(values.map((v) => v.method));
    const spec = {
      data: { values }, mark: { type: "line", point: true },
      encoding: {
        x: { field: "factor", type: "quantitative", title: "share of what training changed" },
        y: { field: "value", type: "quantitative", scale: { zero: false }, title: title(of) },
        color: { ...coded.color, legend: {} }, detail: { field: "name" },
      },
    };
    const words = `${of.label} by the share of what training changed: ${values.map((v) => `${v.name} at ${v.factor}: ${number(v.value, of.digits)}`).join("; ")}.`;
    return draw("rewind-lines", spec, words, [["method", "factor", choice.value], ...values.map((v) => [v.name, v.factor, v.value])]);
  }

  peftlib.prepareCharts = () => {
    const known = data().figures.filter((of) => of.better), pairs = (all) => all.map((of) => [of.key, title(of)]);
    const across = AGAINST.map(figure).filter(Boolean);
    options($("pareto-y"), pairs(known), known[0]?.key);
    options($("pareto-x"), pairs(across), across[0]?.key);
    const scored = new Set(data().sources.map((one) => one.key));
    options($("source-score"), pairs(known.filter((of) => scored.has(of.key))), "rougeL");
    options($("bench-score"), pairs(known.filter((of) => of.key.startsWith("bench_"))));
    const hasRetention = data().rewound.some((one) => one.points.some((point) => Number.isFinite(point.retention)));
    options($("rewind-score"), [["general_loss", "loss on general text"], ["test_loss", "loss on the test rows"], ["rougeL", "ROUGE-L"], ...(hasRetention ? [["retention", "accuracy on retention tasks"]] : [])]);
    const places = { tradeoffs: pareto, training: loss, sources, benchmarks, rewind };
    const has = { tradeoffs: across.length, training: true, sources: scored.size, benchmarks: $("bench-score").options.length, rewind: data().rewound.length };
    for (const id of Object.keys(places)) $(id).hidden = !has[id];
    for (const [id, redraw] of Object.entries(places)) {
      for (const control of $(id).querySelectorAll("select, input")) control.addEventListener("input", redraw);
    }
    peftlib.drawCharts = () => Promise.all(Object.entries(places).filter(([id]) => has[id]).map(([, redraw]) => redraw()));
  };
})();
