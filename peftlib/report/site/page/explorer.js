"use strict";
// The test rows with two runs' answers: text search, sorting by score or gain, the reference's words marked.
peftlib.explorer = (() => {
  const { $, el, number, options, labelled, load, save, csv, swatch, data } = peftlib;
  const METRICS = [["rougeL", "ROUGE-L"], ["bleu4", "BLEU-4 of the row"]];
  const ORDERS = ["file order", "highest score", "lowest score", "largest gain", "largest loss"];
  const PAGE = 10;
  let rows = null, runs = new Map(), found = [], at = 0, parts = {};

  const chosen = (name) => data().answers[Number(parts[name].value)];
  const labelOf = (of) => (data().studies.length > 1 ? `${of.study}: ${of.run}` : of.run);

  function start() {
    const files = data().answers;
    $("no-answers").hidden = files.length > 0;
    if (!files.length) return;
    const pairs = files.map((of, number) => [String(number), labelOf(of)]);
    const first = Math.max(files.findIndex((of) => of.method !== "base"), 0), base = Math.max(files.findIndex((of) => of.method === "base"), 0);
    parts = {
      run: options(el("select"), pairs, String(first)), over: options(el("select"), pairs, String(base)),
      source: options(el("select"), [["", "all sources"], ...data().studies[0].sources.map((name) => [name, name])], ""),
      text: el("input", { type: "search", placeholder: "in prompt, reference, answers", autocomplete: "off" }),
      order: options(el("select"), ORDERS.map((name) => [name, name]), "largest gain"),
      metric: options(el("select"), METRICS, "rougeL"),
      marked: el("input", { type: "checkbox", checked: true }),
      count: el("output"), list: el("table", { className: "found" }), detail: el("div", { "aria-live": "polite" }),
      previous: el("button", { type: "button", textContent: "Previous", onclick: () => move(-PAGE) }),
      next: el("button", { type: "button", textContent: "Next", onclick: () => move(PAGE) }),
      csv: el("button", { type: "button", textContent: "CSV", title: "The matching rows, in this order", onclick: download }),
    };
    const controls = el("div", { className: "controls" }, labelled("Answers of", parts.run), labelled("against", parts.over), labelled("Source", parts.source),
      labelled("Search", parts.text), labelled("Sort by", parts.order), labelled("Score", parts.metric), labelled("mark words", parts.marked));
    const list = el("div", { className: "scroller", role: "region", "aria-label": "Rows found", tabIndex: 0 }, parts.list);
    const body = el("div", { hidden: true }, controls, list, el("div", { className: "controls" }, parts.previous, parts.next, parts.csv, parts.count), parts.detail);
    const open = el("button", { type: "button", textContent: `Read the answers to ${number(data().studies[0].n_test, 0)} test rows` });
    open.onclick = async () => {
      open.disabled = true;
      open.textContent = "Loading …";
      const fault = await choose();
      open.disabled = false;
      open.textContent = fault;
      if (fault) return;
      open.hidden = true;
      body.hidden = false;
      parts.text.focus();
    };
    $("explorer").append(open, body);
    for (const name of ["run", "over"]) parts[name].addEventListener("input", choose);
    for (const name of ["source", "text", "order", "metric"]) parts[name].addEventListener("input", find);
    parts.marked.addEventListener("input", show);
  }

  /** Load requested data that are not loaded yet; returns an error message or "". */
  async function choose() {
    try {
      rows ??= await load("rows");
      rows.lower ??= rows.prompts.map((prompt, i) => `${prompt}\n${rows.references[i]}`.toLowerCase());
      for (const { file } of [chosen("run"), chosen("over")]) {
        if (runs.has(file)) continue;
        const run = await load(file);
        run.lower = run.answers.map((text) => text.toLowerCase());
        runs.set(file, run);
      }
    } catch (error) {
      return parts.count.textContent = `${error.message}: copy the whole folder, then try again.`;
    }
    find();
    return "";
  }

  const pair = () => [runs.get(chosen("run").file), runs.get(chosen("over").file)];
  const gainOf = ([run, over], i) => run[parts.metric.value][i] - over[parts.metric.value][i];

  function find() {
    if (pair().includes(undefined)) return;  // one of them is still being loaded
    const [run, over] = pair(), wanted = parts.text.value.trim().toLowerCase(), source = parts.source.value, order = parts.order.value;
    const holds = (i) => (!source || rows.rows[i][1] === source)
      && (!wanted || rows.lower[i].includes(wanted) || run.lower[i].includes(wanted) || over.lower[i].includes(wanted));
    found = rows.rows.map((_, i) => i).filter(holds);
    const scores = run[parts.metric.value], value = order.includes("score") ? (i) => scores[i] : (i) => gainOf([run, over], i);
    const sign = order === "highest score" || order === "largest gain" ? -1 : 1;
    if (order !== ORDERS[0]) found.sort((a, b) => sign * (value(a) - value(b)) || a - b);
    at = 0;
    list();
    show();
  }

  function move(by) {
    at = Math.min(Math.max(0, Math.floor(at / PAGE) * PAGE + by), Math.max(0, found.length - 1));
    list();
    show();
  }

  function list() {
    const first = Math.floor(at / PAGE) * PAGE, metric = METRICS.find(([key]) => key === parts.metric.value);
    const head = ["prompt", "source", labelOf(chosen("run")), labelOf(chosen("over")), "gain", "row"], isNumber = (n) => n > 1 && n < 5;
    const line = (i, place) => el("tr", { "aria-current": place === at ? "true" : null },
      el("th", { scope: "row", className: "prompt" }, el("button", { type: "button", dir: "auto", onclick: () => pick(place) }, rows.prompts[i].trim().slice(0, 120) || "(empty)")),
      el("td", {}, el("bdi", {}, rows.rows[i][1])),
      ...[...pair().map((run) => run[metric[0]][i]), gainOf(pair(), i)].map((value) => el("td", { className: "number" }, number(value, 3))),
      el("td", { className: "quiet" }, el("bdi", {}, rows.rows[i][0])));
    parts.list.replaceChildren(el("caption", { hidden: true }, `Rows found, ${metric[1]}`), el("thead", {}, el("tr", {}, ...head.map((name, n) => el("th", { scope: "col", className: isNumber(n) ? "number" : "" }, el("bdi", {}, name))))),
      el("tbody", {}, ...found.slice(first, first + PAGE).map((i, n) => line(i, first + n))));
    parts.count.textContent = found.length ? `${number(first + 1, 0)} to ${number(Math.min(first + PAGE, found.length), 0)} of ${number(found.length, 0)} rows` : "No row contains this: shorten the search, or choose all sources.";
    parts.previous.disabled = first === 0;
    parts.next.disabled = first + PAGE >= found.length;
    parts.csv.disabled = !found.length;
  }

  function pick(place) {
    at = place;
    list();
    show();
    parts.list.querySelectorAll("th button")[place % PAGE].focus();
  }

  /** A text with the reference's words marked: alternating lengths of parts, other words first. */
  function markedText(text, lengths) {
    const made = el("div", { className: "text", dir: "auto" });
    let from = 0;
    for (const [n, length] of lengths.entries()) {
      const part = text.slice(from, from + length), words = part.trimEnd();
      if (words) made.append(el(n % 2 ? "mark" : "u", {}, words));
      made.append(part.slice(words.length));
      from += length;
    }
    made.append(text.slice(from));
    return made;
  }

  function card(name, method, facts, text) {
    const made = el("div", { className: "card" }, el("h3", {}, method ? swatch(method) : null, el("bdi", {}, name)), el("div", { className: "quiet" }, facts), text);
    if (method) made.style.borderTopColor = peftlib.color(method);
    return made;
  }

  function show() {
    if (!rows || !parts.detail) return;
    if (!found.length) { parts.detail.replaceChildren(); return; }
    const i = found[at], plain = (text) => el("div", { className: "text", dir: "auto" }, text.trim() ? text : "(empty)");
    const ofRun = (of) => {
      const run = runs.get(of.file), text = run.answers[i];
      const facts = `${METRICS.map(([key, label]) => `${label.replace(" of the row", "")} ${number(run[key][i], 3)}`).join(", ")}; ${run.tokens[i]} tokens, ${run.cut[i] ? "cut at the token limit" : "finished"}`;
      return card(labelOf(of), of.method, facts, text.trim() && parts.marked.checked ? markedText(text, run.marks[i]) : plain(text));
    };
    const shown = [...new Set([chosen("over"), chosen("run")])];
    const legend = el("p", { className: "quiet" }, el("mark", {}, "Shaded"), ": the reference's words, in its order; ", el("u", {}, "dotted"), ": other words. Scores are for this row only, from 0 to 1.");
    parts.detail.replaceChildren(card(`Prompt of ${rows.rows[i][0]}`, null, rows.rows[i][1], plain(rows.prompts[i])),
      el("div", { className: "cards" }, card("reference", null, "from the data", plain(rows.references[i])), ...shown.map(ofRun)), parts.marked.checked ? legend : "");
  }

  function download() {
    const shown = [...new Set([chosen("run"), chosen("over")])];
    const head = ["source", "id", "prompt", "reference", ...shown.flatMap((of) => ["answer", "rougeL", "row_bleu4", "n_tokens"].map((name) => `${labelOf(of)} ${name}`))];
    const cells = (of, i) => { const run = runs.get(of.file); return [run.answers[i], run.rougeL[i], run.bleu4[i], run.tokens[i]]; };
    save("answers.csv", csv([head, ...found.map((i) => [rows.rows[i][1], rows.rows[i][0], rows.prompts[i], rows.references[i], ...shown.flatMap((of) => cells(of, i))])]), "text/csv");
  }

  return { start, show };
})();
