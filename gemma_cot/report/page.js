"use strict";
// Reads values out of the curves and fills the step microscope. Data come from the JSON block
// #data and reach the page as text only (textContent), never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const LEFT = 56, RIGHT = 18, WIDTH = 400; // a panel's plot, as curves.py draws it

  function node(name, attributes, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  const number = (value, digits = 3) =>
    value === null || value === undefined ? "none"
      : Math.abs(value) >= 0.001 || value === 0 ? String(Number(value.toPrecision(digits)))
        : value.toExponential(1);

  // ------------------------------------------------------------------ curves

  function nearest(points, step) {
    let best = points[0];
    for (const point of points) if (Math.abs(point[0] - step) < Math.abs(best[0] - step)) best = point;
    return best;
  }

  document.querySelectorAll("figure[data-panel]").forEach((figure) => {
    const panel = data.panels[Number(figure.dataset.panel)];
    const svg = figure.querySelector("svg"), readout = figure.querySelector("output");
    const lines = Object.entries(panel.lines);
    const [first, last] = panel.range;
    const mark = document.createElementNS("http://www.w3.org/2000/svg", "path");
    mark.setAttribute("class", "mark");
    svg.append(mark);
    let at = null;

    function show(step) {
      at = nearest(lines[0][1], step)[0];
      const x = LEFT + ((at - first) / (last - first)) * (WIDTH - LEFT - RIGHT);
      mark.setAttribute("d", `M${x} 62V246`);
      readout.textContent = `step ${at}: ` +
        lines.map(([name, points]) => `${name} ${number(nearest(points, at)[1])}`).join(", ");
    }

    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * WIDTH;
      show(first + ((x - LEFT) / (WIDTH - LEFT - RIGHT)) * (last - first));
    });
    figure.addEventListener("keydown", (event) => {
      const points = lines[0][1];
      const i = at === null ? -1 : points.findIndex((point) => point[0] === at);
      const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: points.length - 1 }[event.key];
      if (to === undefined || event.target !== figure) return;
      event.preventDefault();
      show(points[Math.max(0, Math.min(points.length - 1, to))][0]);
    });
  });

  // -------------------------------------------------------------- microscope

  const home = byId("microscope");

  function microscope() {
    const step = byId("step"), group = byId("group"), kind = byId("kind");
    const view = () => data.steps[step.selectedIndex];

    function fillGroups() {
      group.replaceChildren(...view().groups.map((one) =>
        node("option", {}, `${one.number}: ${one.prompt.slice(0, 40)}`)));
    }

    function draw() {
      hideToken();
      const shown = view(), one = shown.groups[group.selectedIndex];
      home.replaceChildren(...groupNodes(shown, one, kind.value));
      history.replaceState(null, "", `#step=${shown.step}&group=${one.number}&show=${kind.value}`);
    }

    function move(by) {
      const to = group.selectedIndex + by;
      if (to >= 0 && to < group.options.length) group.selectedIndex = to;
      else if (step.options[step.selectedIndex + by]) {
        step.selectedIndex += by;
        fillGroups();
        group.selectedIndex = by > 0 ? 0 : group.options.length - 1;
      }
      draw();
    }

    step.addEventListener("change", () => { fillGroups(); draw(); });
    group.addEventListener("change", draw);
    kind.addEventListener("change", draw);
    byId("before").addEventListener("click", () => move(-1));
    byId("after").addEventListener("click", () => move(1));

    const wanted = new URLSearchParams(location.hash.slice(1));
    const stepAt = data.steps.findIndex((one) => String(one.step) === wanted.get("step"));
    step.selectedIndex = Math.max(0, stepAt);
    fillGroups();
    const groupAt = view().groups.findIndex((one) => String(one.number) === wanted.get("group"));
    group.selectedIndex = Math.max(0, groupAt);
    if (wanted.get("show")) kind.value = wanted.get("show");
    if (!kind.value) kind.selectedIndex = 0;
    const hash = location.hash;
    draw();
    if (stepAt < 0) history.replaceState(null, "", hash || location.pathname);
    else byId("microscope").scrollIntoView();
  }

  function groupNodes(shown, one, kind) {
    const names = Object.keys(one.completions[0].scores);
    const head = ["completion", ...names, "reward", "advantage"];
    const rows = one.completions.map((completion, i) => node("tr", {},
      node("th", { scope: "row" }, `${i + 1}`),
      ...names.map((name) => node("td", {}, number(completion.scores[name]))),
      node("td", {}, number(completion.reward)), node("td", {}, number(completion.advantage))));
    const checkpoints = one.checkpoints.map((text, i) => node("tr", {},
      node("th", { scope: "row" }, node("code", {}, text)),
      ...one.completions.map((completion) => node("td", {}, completion.hits[i] ? "found" : "–"))));
    const parts = [
      node("h3", {}, `Step ${shown.step}, group ${one.number} of ${shown.of}`),
      node("p", { class: "small" }, `row ${one.row}, ${one.domain}, sampled in rollout ${one.rollout}. `,
        "The same tokens again: ",
        node("code", {}, `python -m gemma_cot.generate --replay=${data.run}:${shown.step}:${one.number}`)),
    ];
    if (shown.groups.length < shown.of) {
      parts.push(node("p", { class: "small" },
        `${shown.groups.length} of this step's ${shown.of} groups are in this file. All of them: `,
        node("code", {}, `python -m gemma_cot.report --run=${data.run} --step=${shown.step}`)));
    }
    parts.push(
      node("p", { class: "question" }, one.prompt),
      node("p", {}, "Right answer: ", node("code", {}, String(one.gold))),
      scroll(table(head, rows)), node("p", {}, one.statistics + "."));
    if (checkpoints.length) {
      parts.push(scroll(table(["checkpoint", ...one.completions.map((_, i) => `${i + 1}`)],
        checkpoints)));
    }
    const scale = scaleOf(one, kind);
    parts.push(node("p", { class: "legend" }, scale.legend));
    if (kind === "mask") {
      const tokens = one.pieces.map((piece) => node("span", { class: "off" }, readable(piece)));
      parts.push(node("h4", {}, `prompt: ${one.pieces.length} tokens, none in the loss`),
        node("pre", { class: "tokens" }, ...tokens));
    }
    one.completions.forEach((completion, i) => {
      const sign = completion.advantage > 0 ? "+" : "";
      const end = completion.stopped ? "" : ", cut off";
      parts.push(node("section", { class: "member" },
        node("h4", {}, `completion ${i + 1}: reward ${number(completion.reward)}, advantage ` +
          `${sign}${number(completion.advantage)}, ${completion.pieces.length} tokens${end}`),
        node("p", { class: "small" }, `r = ${completion.sum}`, node("br"), completion.formula),
        kind === "text" ? marked(completion) : tokens(completion, kind, scale, i + 1)));
    });
    return parts;
  }

  function table(head, rows) {
    return node("table", {},
      node("thead", {}, node("tr", {}, ...head.map((word) => node("th", { scope: "col" }, word)))),
      node("tbody", {}, ...rows));
  }

  function scroll(inner) {
    return node("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "table" }, inner);
  }

  function marked(completion) {
    const names = ["", "tag", "hit"];
    return node("pre", {}, ...completion.text.map(([kind, text]) =>
      kind ? node("span", { class: names[kind] }, text) : text));
  }

  function value(completion, name, i) {
    const values = completion.tokens[name];
    if (values === undefined) return undefined;
    const one = Array.isArray(values) ? values[i] : values;
    return one === null ? null : one / 10 ** data.decimals[name];
  }

  // What a view colours by: f(completion, i) -> a number, 0 for no colour.
  const VIEWS = {
    "log-prob": ["surprise, minus the log-prob", (c, i) => -value(c, "logp", i)],
    ratio: ["|log ratio| of policy to old policy; orange above 1, blue below",
      (c, i) => Math.log(value(c, "ratio", i) || 1)],
    KL: ["KL (k3) from the reference", (c, i) => value(c, "kl", i) || 0],
    entropy: ["entropy of the next-token distribution", (c, i) => value(c, "entropy", i)],
  };

  function scaleOf(one, kind) {
    if (kind === "text") return { legend: "Tags are framed; checkpoints that were found are underlined." };
    if (kind === "clip") return { legend: "Orange: the ratio was clipped and the token gave no gradient." };
    if (kind === "mask") return { legend: "Green: the token is in the loss. Grey: it is not. Padding is not shown." };
    const [meaning, read] = VIEWS[kind];
    const sizes = one.completions.flatMap((completion) =>
      completion.pieces.map((_, i) => Math.abs(read(completion, i)))).sort((a, b) => a - b);
    const full = sizes[Math.floor(0.98 * (sizes.length - 1))] || 0;
    const words = full > 0 ? `full colour from ${number(full)} nats on` : "0 everywhere in this group";
    return { legend: `Colour: ${meaning}; ${words}. Point at a token, or walk with the arrow keys.`,
      read, full };
  }

  function tokens(completion, kind, scale, place) {
    const spans = completion.pieces.map((piece, i) => {
      const span = node("span", { tabindex: i ? "-1" : "0" }, readable(piece));
      paint(span, completion, kind, scale, i);
      return span;
    });
    const strip = node("pre", { class: "tokens", role: "group",
      "aria-label": `tokens of completion ${place}; arrow keys move` }, ...spans);
    const tell = (event) => {
      const i = spans.indexOf(event.target);
      if (i >= 0) showToken(completion, i);
    };
    strip.addEventListener("pointerover", tell);
    strip.addEventListener("focusin", tell);
    strip.addEventListener("pointerleave", hideToken);
    strip.addEventListener("focusout", hideToken);
    strip.addEventListener("keydown", (event) => {
      const i = spans.indexOf(event.target);
      const to = { ArrowRight: i + 1, ArrowLeft: i - 1, ArrowDown: i + 10, ArrowUp: i - 10,
        Home: 0, End: spans.length - 1 }[event.key];
      if (i < 0 || to === undefined) return;
      event.preventDefault();
      const next = spans[Math.max(0, Math.min(spans.length - 1, to))];
      spans[i].tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
    return strip;
  }

  function paint(span, completion, kind, scale, i) {
    if (kind === "clip") span.className = completion.clipped.includes(i) ? "clipped" : "";
    else if (kind === "mask") span.className = value(completion, "weight", i) > 0 ? "on" : "off";
    else if (scale.full > 0) {
      const size = scale.read(completion, i);
      const share = Math.min(1, Math.abs(size) / scale.full);
      const colour = size < 0 ? "0, 114, 178" : "213, 94, 0";
      if (share > 0.02) span.style.backgroundColor = `rgba(${colour}, ${(0.6 * share).toFixed(2)})`;
    }
  }

  function readable(piece) {
    const text = piece.replaceAll("\u2581", " ");
    return text === "\n" || text === "<0x0A>" ? "\u21b5\n" : text;
  }

  function showToken(completion, i) {
    const read = (name) => value(completion, name, i);
    const old = read("logp_old") === undefined ? "" : `, old policy ${number(read("logp_old"))}`;
    const reference = read("logp_ref") === undefined ? ""
      : `, reference ${number(read("logp_ref"))}, KL ${number(read("kl"))}`;
    byId("token").textContent =
      `token ${i + 1} of ${completion.pieces.length} “${readable(completion.pieces[i])}”: ` +
      `log-prob ${number(read("logp"))} (p ${number(Math.exp(read("logp")))})${old}, sampler ` +
      `${number(read("logp_sampler"))}, ratio ${number(read("ratio"), 5)}${reference}, entropy ` +
      `${number(read("entropy"))}, weight ${number(read("weight"))}` +
      (completion.clipped.includes(i) ? ", clipped" : "");
    byId("token").hidden = false;
  }

  function hideToken() {
    byId("token").hidden = true;
  }

  if (home) microscope();

  // -------------------------------------------------------------------- live

  const reload = byId("reload");
  if (reload) {
    reload.checked = sessionStorage.getItem("reload") !== "no";
    reload.addEventListener("change", () =>
      sessionStorage.setItem("reload", reload.checked ? "yes" : "no"));
    setInterval(() => { if (reload.checked) location.reload(); },
      1000 * Number(reload.dataset.seconds));
  }
})();
