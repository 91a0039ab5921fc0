/* Fills the page: from the server while it lives, else from what is embedded. Texts of a run are written as text, never as markup. */
"use strict";
(async () => {
  const meta = JSON.parse(document.getElementById("meta").textContent);
  const byId = (id) => document.getElementById(id);
  const several = meta.runs.length > 1;
  /* run -> its newest view */
  const views = meta.runs.map(() => null);

  /* --- elements and numbers --------------------------------------------------------------------- */

  function element(tag, attributes, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "style") made.style.cssText = value;
      else made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }

  function formatted(value, format) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    const size = Math.abs(value);
    if (format === "share") return `${(100 * value).toFixed(size < 0.0995 && size > 0 ? 1 : 0)} %`;
    if (format === "count") {
      if (size >= 1e6) return `${(value / 1e6).toFixed(1)}M`;
      return size >= 1e4 ? `${(value / 1e3).toFixed(1)}k` : value.toFixed(size < 10 && size % 1 ? 1 : 0);
    }
    if (format === "scientific") return value ? value.toExponential(2) : "0";
    if (size >= 1e5 || (size && size < 1e-3)) return value.toExponential(1);
    return value.toFixed(size >= 100 ? 1 : size >= 10 ? 2 : 3);
  }

  const signed = (value, digits = 2) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}`;

  function duration(seconds) {
    if (seconds === null || seconds === undefined) return "–";
    if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
    const minutes = Math.round(seconds / 60);
    if (minutes < 60) return `${minutes} min`;
    return minutes < 2880 ? `${Math.floor(minutes / 60)} h ${minutes % 60} min` : `${(minutes / 1440).toFixed(1)} days`;
  }

  function unpacked(text) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    return new Float32Array(bytes.buffer);
  }

  /* --- theme ------------------------------------------------------------------------------------- */

  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const remembered = (() => { try { return localStorage.getItem("theme"); } catch { return null; } })();
  const asked = new URLSearchParams(location.search).get("theme") || remembered;
  if (asked === "dark" || asked === "light") document.documentElement.dataset.theme = asked;

  const isDark = () => (document.documentElement.dataset.theme || (prefersDark.matches ? "dark" : "light")) === "dark";

  function paintCharts() {
    const style = getComputedStyle(document.documentElement);
    const muted = style.getPropertyValue("--muted").trim(), grid = style.getPropertyValue("--grid").trim();
    const font = getComputedStyle(document.body).fontFamily;
    for (const root of bokeh.roots()) {
      for (const part of [...root.left, ...root.below, ...root.center]) {
        if (part.type === "Grid" && part.grid_line_color) part.grid_line_color = grid;
        if ("major_label_text_color" in part) {
          part.major_label_text_color = muted;
          part.major_label_text_font = font;
        }
      }
    }
  }

  function switchTheme() {
    const theme = isDark() ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    try { localStorage.setItem("theme", theme); } catch { /* private mode */ }
    paintCharts();
  }

  /* --- charts ------------------------------------------------------------------------------------ */

  Bokeh.set_log_level("error");  /* it warns of charts without data, which come next */
  await Bokeh.embed.embed_items(meta.docs, [meta.item]);
  const bokeh = Bokeh.documents[0];
  const model = (name) => bokeh.get_model_by_name(name);
  const axis = model("updates");
  if (innerWidth < 600) for (const root of bokeh.roots()) for (const part of root.below) if (part.ticker && "desired_num_ticks" in part.ticker) part.ticker.desired_num_ticks = 3;
  if (matchMedia("(pointer: coarse)").matches) {
    /* A finger that scrolls the page must not zoom. */
    for (const root of bokeh.roots()) root.toolbar.tools.forEach((tool) => { if ("active" in tool && tool.type === "BoxZoomTool") tool.active = false; });
  }

  /* Charts that are seen, and charts whose newest data are not drawn yet: only what is seen is drawn. */
  const seen = new Set(), waiting = new Set();
  const charts = [...document.querySelectorAll(".chart")];
  const keyOf = (chart) => chart.id.replace("chart-", "");
  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) isIntersecting ? seen.add(keyOf(target)) : seen.delete(keyOf(target));
    drawSeen();
  }, { rootMargin: "200px" });
  addEventListener("beforeprint", () => { charts.forEach((chart) => seen.add(keyOf(chart))); drawSeen(); });

  function drawSeen() {
    for (const key of [...waiting].filter((one) => seen.has(one))) {
      waiting.delete(key);
      if (key === "timeline") {
        if (views[chosenRun()]) fillTimeline(views[chosenRun()].timeline);
      } else views.forEach((view, run) => {
        if (!view) return;
        if (key === "score") fillScores(run, view.scores);
        else if (key === "score_sources") fillSourceScores(run, view.scores);
        else fillCurves(key, run, view.curves);
      });
    }
  }

  function fillCurves(chart, run, curves) {
    const source = model(`${chart}-${run}`);
    const x = unpacked(curves.x), empty = new Float32Array(x.length).fill(NaN);
    const data = { x };
    for (const column of Object.keys(source.data)) {
      if (column === "x" || column.includes("|")) continue;
      const mean = column in curves.mean ? unpacked(curves.mean[column]) : empty;
      const [low, high] = column in curves.band ? curves.band[column].map(unpacked) : [mean, mean];
      data[column] = mean;
      data[`${column}|low`] = low;
      data[`${column}|high`] = high;
    }
    source.data = data;
  }

  function fillScores(run, scores) {
    const columns = (pick) => scores.map(pick);
    model(`score-${run}`).data = {
      update: columns((s) => s.update), value: columns((s) => s.value), low: columns((s) => s.low), high: columns((s) => s.high),
      checkpoint: columns((s) => s.checkpoint), size: columns((s) => (s.best ? 11 : 7)),
    };
  }

  function fillSourceScores(run, scores) {
    const source = model(`score_sources-${run}`), data = { update: scores.map((s) => s.update) };
    for (const column of Object.keys(source.data)) {
      if (column === "update") continue;
      const [name, part] = column.split("|");
      data[column] = scores.map((s) => (s.by_source[name] ? s.by_source[name][part || "value"] : NaN));
    }
    source.data = data;
  }

  function fillTimeline(timeline) {
    const actors = model("actors"), spans = timeline.spans;
    const lanes = [...timeline.actors].reverse();
    if (JSON.stringify(actors.factors) !== JSON.stringify(lanes)) actors.factors = lanes;
    const plot = bokeh.roots().find((root) => root.y_range === actors);
    const height = 60 + 34 * Math.max(lanes.length, 2);
    if (plot.height !== height) plot.height = height;
    model("spans").data = {
      actor: spans.map((s) => s[0]), doing: spans.map((s) => s[1]), begin: spans.map((s) => s[2]), end: spans.map((s) => s[3]),
      what: spans.map((s) => s[4]), seconds: spans.map((s) => s[3] - s[2]), colour: spans.map((s) => meta.doing[s[1]]),
    };
  }

  function fillKeys() {
    for (const button of document.querySelectorAll("button[data-curve]")) {
      const format = button.closest(".chart").dataset.format;
      const values = views.map((view) => (view ? view.latest[button.dataset.curve] : null));
      button.querySelector("b").replaceChildren(...values.map((value, run) =>
        element("span", { style: several ? `color: ${meta.runs[run].colour}` : "" }, formatted(value, format))));
    }
  }

  for (const button of document.querySelectorAll("button[data-curve]")) {
    button.addEventListener("click", () => {
      const visible = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", visible);
      const plotId = button.closest(".chart").querySelector(".plot").id;
      const root = bokeh.roots().find((one) => meta.item.roots[one.id] === plotId);
      for (const renderer of root.renderers) if ((renderer.name || "").endsWith(`|${button.dataset.curve}`)) renderer.visible = visible;
    });
  }

  /* --- the part of the run that the curves show ---------------------------------------------------- */

  /* [first, last], or null: the whole run */
  let zoomed = null, moving = false, zoomTimer = 0;

  function extent() {
    const last = Math.max(1, ...views.map((view) => (view ? view.summary.update : 0)));
    return [-0.02 * last, 1.02 * last];
  }

  function showRange() {
    const [start, end] = zoomed || extent();
    moving = true;
    axis.setv({ start, end });
    [axis.reset_start, axis.reset_end] = extent();
    moving = false;
    byId("zoom-out").hidden = !zoomed;
  }

  function zoomTo(range) {
    const [first, last] = extent();
    zoomed = range && range[1] - range[0] < 0.98 * (last - first) ? range : null;
    showRange();
    loadAll();
  }

  function followAxis() {
    if (moving) return;
    clearTimeout(zoomTimer);
    zoomTimer = setTimeout(() => zoomTo([axis.start, axis.end]), 150);
  }
  axis.properties.start.change.connect(followAxis);
  axis.properties.end.change.connect(followAxis);
  byId("zoom-out").addEventListener("click", () => zoomTo(null));

  function zoomBy(factor, shift) {
    const [start, end] = zoomed || extent(), [first, last] = extent();
    const half = (factor * (end - start)) / 2, middle = (start + end) / 2 + shift * (end - start);
    const centre = Math.min(Math.max(middle, first + half), last - half);
    zoomTo(2 * half >= last - first ? null : [centre - half, centre + half]);
  }

  /* --- summary, workers, alarms -------------------------------------------------------------------- */

  const STATES = { running: "running", ended: "ended", failed: "ended by an error", gone: "stopped without a word", starting: "starting" };

  function tile(label, value, note, noteClass) {
    return element("div", { class: "card tile" }, element("small", {}, label), element("strong", {}, value),
      element("span", { class: `note ${noteClass || ""}` }, note || ""));
  }

  function interval(estimate) {
    return estimate ? `[${estimate.low.toFixed(2)}, ${estimate.high.toFixed(2)}]` : "";
  }

  function gainNote(summary) {
    const gain = summary.gain;
    if (!gain) return [summary.best ? `95 % ${interval(summary.best)}` : "no evaluation yet", ""];
    const sure = gain.low > 0 ? "up" : gain.high < 0 ? "down" : "";
    const words = sure ? "" : ": no difference that these problems show";
    return [`${signed(gain.value)} [${signed(gain.low)}, ${signed(gain.high)}]${words}`, sure];
  }

  function scoreText(summary) {
    if (!summary.best) return summary.base ? summary.base.value.toFixed(2) : "–";
    const base = summary.base ? `${summary.base.value.toFixed(2)} → ` : "";
    return `${base}${summary.best.value.toFixed(2)}`;
  }

  function fillSummary() {
    const present = views.filter(Boolean);
    if (!present.length) return;
    if (several) return fillComparison();
    const [{ summary }] = present;
    const updates = summary.total ? `${summary.update} / ${summary.total}` : String(summary.update);
    const left = summary.remaining_s !== null ? `${duration(summary.remaining_s)} left` : summary.why;
    byId("summary").replaceChildren(element("div", { class: "tiles" },
      tile(summary.best && summary.best_checkpoint !== "base" ? `score, base → ${summary.best_checkpoint}` : "score of the base model", scoreText(summary), ...gainNote(summary)),
      tile("reward, newest update", formatted(summary.reward), summary.reward_std === null ? "" : `± ${formatted(summary.reward_std)} over its completions`),
      tile("updates", updates, left),
      tile("time", duration(summary.seconds), summary.update_s ? `${duration(summary.update_s)} per update` : ""),
      tile("model", summary.model || "–", "")));
  }

  function fillComparison() {
    const head = ["run", "state", "updates", "score, base → best", "gain", "reward", "per update"];
    const rows = views.map((view, run) => {
      if (!view) return element("tr");
      const { summary } = view, [note, noteClass] = gainNote(summary);
      const total = summary.total ? ` / ${summary.total}` : "";
      return element("tr", {},
        element("th", { scope: "row" }, element("i", { class: "dot", style: `--c: ${meta.runs[run].colour}` }), meta.runs[run].name),
        element("td", {}, STATES[summary.state]), element("td", {}, `${summary.update}${total}`), element("td", {}, scoreText(summary)),
        element("td", { class: noteClass }, summary.gain ? note : "–"), element("td", {}, formatted(summary.reward)), element("td", {}, duration(summary.update_s)));
    });
    byId("summary").replaceChildren(element("div", { class: "card scroll" }, element("table", {},
      element("thead", {}, element("tr", {}, ...head.map((word) => element("th", { scope: "col" }, word)))), element("tbody", {}, ...rows))));
  }

  function fillState() {
    const present = views.filter(Boolean);
    if (!present.length) return;
    const running = present.some((view) => view.summary.state === "running");
    const shown = several ? (running ? "running" : "ended") : present[0].summary.state;
    byId("state").className = `state ${shown}`;
    byId("state").textContent = STATES[shown];
    byId("state").title = several ? "" : present[0].summary.why;
    const done = Math.max(...present.map(({ summary }) => (summary.total ? summary.update / summary.total : 0)));
    byId("progress").setAttribute("aria-valuenow", Math.round(100 * done));
    byId("progress").firstElementChild.style.width = `${100 * done}%`;
    byId("measure").textContent = [...new Set(present.map((view) => view.summary.measure).filter(Boolean))].join("; ") || "No evaluation yet.";
    byId("score-runs").replaceChildren(...(several ? meta.runs.map((run) => element("li", {}, element("i", { style: `--c: ${run.colour}` }), run.name)) : []));
  }

  function fillWorkers(view) {
    byId("workers").tBodies[0].replaceChildren(...view.workers.map((worker) => element("tr", {},
      element("th", { scope: "row" }, worker.name + (worker.device ? `, ${worker.device}` : "")),
      element("td", { class: `worker-state ${worker.state}` }, worker.state + (worker.why ? `: ${worker.why}` : "")),
      element("td", {}, formatted(worker.groups, "count")), element("td", {}, formatted(worker.tokens_per_s, "count")),
      element("td", {}, worker.version === null || worker.version < 0 ? "–" : `v${worker.version}`),
      element("td", {}, worker.memory_gb === null ? "–" : `${worker.memory_gb.toFixed(2)} GB`))));
  }

  function alarmCard(alarm, isNew) {
    /* An alarm's text is "fact: cause; cure". */
    const cut = alarm.text.lastIndexOf("; ");
    const [fact, cure] = cut > 0 ? [alarm.text.slice(0, cut), alarm.text.slice(cut + 2)] : [alarm.text, ""];
    return element("div", { class: `card alarm ${isNew ? "" : "past"}` },
      element("h3", {}, alarm.name, element("small", {}, alarm.run || "", alarm.update === null ? "" : ` update ${alarm.update}`)),
      element("p", {}, fact), cure ? element("p", { class: "cure" }, element("b", {}, "What to do: "), cure) : null);
  }

  function fillAlarms() {
    const alarms = views.flatMap((view, run) => (view ? view.alarms.map((alarm) => ({ ...alarm, run: several ? meta.runs[run].name : "" })) : []));
    alarms.sort((a, b) => b.time - a.time);
    byId("alarm-count").hidden = !alarms.length;
    byId("alarm-count").textContent = alarms.length;
    byId("alarm-list").replaceChildren(...(alarms.length ? alarms.map((alarm) => alarmCard(alarm, true)) : [element("p", { class: "card quiet" }, "No alarm so far.")]));
    const newest = byId("newest-alarm"), words = alarms.length ? `${alarms[0].name} ${alarms[0].time}` : "";
    if (newest.dataset.shown !== words) {  /* a screen reader says it once */
      newest.dataset.shown = words;
      newest.replaceChildren(...(alarms.length ? [alarmCard(alarms[0], true)] : []));
    }
  }

  function fillLog(view) {
    byId("log").hidden = !view.log.length;
    byId("log").querySelector("ul").replaceChildren(...[...view.log].reverse().map((line) => element("li", {}, element("b", {}, line.name), line.text)));
  }

  /* --- samples ------------------------------------------------------------------------------------- */

  const filter = byId("filter");
  let shownGroup = null, groupData = null, listed = [], unit = "tokens";

  const bounds = () => Object.fromEntries([...new FormData(filter)].filter(([name, value]) => value !== "" && name !== "colour"));

  function within(reward, length) {
    const asked = bounds();
    if (reward === null) { if (asked.reward_min || asked.reward_max) return false; }
    else if (asked.reward_min && reward < +asked.reward_min || asked.reward_max && reward > +asked.reward_max) return false;
    return !(asked.length_min && length < +asked.length_min || asked.length_max && length > +asked.length_max);
  }

  async function findGroups() {
    if (meta.live) return fetched(`samples?${new URLSearchParams({ run: chosenRun(), ...bounds() })}`);
    const asked = bounds(), all = meta.embedded.samples;
    const groups = all.groups.filter((group) => !(asked.update_min && group.update < +asked.update_min) && !(asked.update_max && group.update > +asked.update_max)
      && group.rewards.some((reward, index) => within(reward, group.lengths[index])));
    return { groups, matching: groups.length, total: all.groups.length, unit: all.unit, of: all.of, reading: false };
  }

  function spark(rewards) {
    const known = rewards.filter((reward) => reward !== null);
    const low = Math.min(0, ...known), high = Math.max(1e-9, ...known);
    const mean = known.length ? known.reduce((sum, reward) => sum + reward, 0) / known.length : null;
    const bars = rewards.map((reward) => element("i", {
      class: reward === null ? "none" : reward === high && high > low ? "best" : "", style: `--h: ${reward === null ? 2 : Math.round(2 + 17 * (reward - low) / (high - low || 1))}px` }));
    return element("span", { title: `rewards ${rewards.map((reward) => formatted(reward)).join(", ")}` }, element("span", { class: "spark", "aria-hidden": "true" }, ...bars), ` ${mean === null ? "–" : mean.toFixed(2)}`);
  }

  async function listGroups() {
    const found = await findGroups();
    if (!found) return;
    listed = found.groups;
    unit = found.unit;
    for (const word of document.querySelectorAll(".unit")) word.textContent = unit;
    const more = found.matching > listed.length ? `the newest ${listed.length} of ` : "";
    const of = found.of ? `, chosen from ${found.of}` : "";
    byId("found").textContent = `${more}${found.matching} of ${found.total} groups${of}${found.reading ? ", still reading" : ""}`;
    byId("groups").tBodies[0].replaceChildren(...listed.map((group) => {
      const mean = group.lengths.reduce((sum, length) => sum + length, 0) / group.lengths.length;
      const row = element("tr", { "data-id": group.id, "aria-selected": group.id === shownGroup }, element("td", {}, String(group.update)),
        element("td", {}, element("button", { type: "button" }, group.problem)), element("td", {}, spark(group.rewards)), element("td", {}, mean.toFixed(0)));
      row.addEventListener("click", () => showGroup(group.id));
      return row;
    }));
    if (!listed.length) return byId("group").replaceChildren(element("p", { class: "quiet" }, found.total ? "No group matches the filter." : "No samples yet."));
    if (shownGroup === null || !listed.some((group) => group.id === shownGroup)) await showGroup(listed[0].id);
    else drawGroup();
  }

  async function showGroup(id) {
    const data = meta.live ? await fetched(`samples/${id}?${new URLSearchParams({ run: chosenRun() })}`) : meta.embedded.samples.contents[id];
    if (!data) return;
    [shownGroup, groupData] = [id, data];
    for (const row of byId("groups").tBodies[0].rows) row.setAttribute("aria-selected", Number(row.dataset.id) === id);
    drawGroup();
  }

  function step(by) {
    const place = listed.findIndex((group) => group.id === shownGroup) + by;
    if (!listed[place]) return;
    showGroup(listed[place].id);
    byId("groups").tBodies[0].rows[place].scrollIntoView({ block: "nearest" });
  }

  function tint(value, most) {
    if (value === null || !most || !value) return "";
    const strength = (0.1 + 0.4 * Math.abs(value) / most).toFixed(2);
    return `background: rgba(var(--${value > 0 ? "good" : "bad"}-back), ${strength})`;
  }

  const surprise = (logprob) => `background: rgba(var(--surprise), ${Math.min(0.8, -logprob / 4).toFixed(2)})`;

  const moved = (ratio) => ratio ? `background: rgba(var(--${ratio > 0 ? "good" : "bad"}-back), ${Math.min(0.7, Math.abs(ratio) / 0.3).toFixed(2)})` : "";

  // Of each way to colour single tokens: the numbers, a token's style, and what it says when it is pointed at.
  const PER_TOKEN = {
    logprob: (completion) => [completion.logprobs, surprise, (value) => `log-prob ${value}, p = ${Math.exp(value).toPrecision(2)}`],
    ratio: (completion) => [completion.log_ratios, moved, (value) => `log-ratio ${signed(value)}, ratio ${Math.exp(value).toPrecision(3)}`],
  };

  function kinds(completion) {
    const kind = completion.pieces.map(() => "");
    for (const [name, spans] of [["environment", completion.inserted], ["forced", completion.forced]])
      for (let index = 0; index < spans.length; index += 2) kind.fill(name, spans[index], spans[index + 1]);
    return kind;
  }

  function completionText(completion, colour, most) {
    const kind = kinds(completion), text = element("div", { class: "text", tabindex: "0" });
    const [values, style, says] = PER_TOKEN[colour] ? PER_TOKEN[colour](completion) : [[]];
    const perToken = values.length;
    let start = 0;
    completion.pieces.forEach((piece, index) => {
      if (perToken && !kind[index]) {
        text.append(element("span", { style: style(values[index]), title: says(values[index]) }, piece));
      } else if (index + 1 === completion.pieces.length || kind[index + 1] !== kind[index] || perToken) {
        const begin = perToken && kind[index] ? kind.lastIndexOf("", index) + 1 : start;
        if (perToken && kind[index + 1] === kind[index]) return;
        text.append(element("span", { class: kind[index] || null, style: colour === "advantage" ? tint(completion.advantage, most) : "" }, completion.pieces.slice(begin, index + 1).join("")));
        start = index + 1;
      }
    });
    return text;
  }

  function completionCard(completion, number, colour, most) {
    const functions = Object.entries(completion.rewards).map(([name, value]) => element("span", {}, `${name} `, element("b", {}, formatted(value))));
    return element("section", { class: `completion ${within(completion.reward, completion.length) ? "" : "dim"}`, "aria-label": `Completion ${number}` },
      element("header", {}, element("strong", {}, formatted(completion.reward)),
        completion.advantage === null ? null : element("span", { class: "advantage", style: tint(completion.advantage, most), title: "advantage" }, `A ${signed(completion.advantage)}`),
        element("small", {}, `${completion.length} ${unit}`), completion.truncated ? element("span", { class: "tag" }, "truncated") : null),
      element("div", { class: "functions" }, ...functions), completionText(completion, colour, most));
  }

  const LEGENDS = {
    advantage: "Green: better than the group, the tokens become likelier; red: worse, they become less likely. Every token of a completion has its advantage.",
    logprob: "The stronger the colour, the less likely the token was under the policy that sampled it. Point at a token for the number.",
    ratio: "Green: likelier when it trained than when it was sampled, red: less likely; stale or quantised workers differ by more. Point at a token for the number. Without colour: unchanged, or the completion was not computed, as its advantage is 0.",
    none: "",
  };

  function drawGroup() {
    const group = groupData, colour = filter.elements.colour.value;
    const most = Math.max(...group.completions.map((completion) => Math.abs(completion.advantage || 0)));
    const where = [`update ${group.update}`, group.source, group.worker && `by ${group.worker}`].filter(Boolean).join(" · ");
    const hasTokens = group.completions.some((completion) => completion.logprobs.length);
    const legend = PER_TOKEN[colour] && !hasTokens ? "Log-probs are recorded only with metrics.record_groups = true." : LEGENDS[colour];
    const back = element("button", { type: "button", "aria-label": "Next newer group (k)" }, "‹"), forward = element("button", { type: "button", "aria-label": "Next older group (j)" }, "›");
    back.addEventListener("click", () => step(-1));
    forward.addEventListener("click", () => step(1));
    byId("group").replaceChildren(
      element("h3", {}, group.problem, element("small", {}, where), element("span", { class: "steps" }, back, forward)),
      ...group.messages.map((message) => element("div", { class: "message clip" }, element("b", {}, message.role), element("div", {}, message.content))),
      group.answer ? element("div", { class: "message" }, element("b", {}, "true answer"), element("div", {}, group.answer)) : "",
      element("div", { class: "completions" }, ...group.completions.map((completion, index) => completionCard(completion, index + 1, colour, most))),
      legend ? element("p", { class: "legend" }, legend) : "");
  }

  let filterTimer = 0;
  filter.addEventListener("input", (event) => {
    if (event.target.id === "colour") return groupData && drawGroup();
    clearTimeout(filterTimer);
    filterTimer = setTimeout(listGroups, 150);
  });
  filter.addEventListener("submit", (event) => event.preventDefault());
  filter.addEventListener("reset", () => setTimeout(listGroups));

  /* --- data ---------------------------------------------------------------------------------------- */

  const chooser = byId("run");
  const chosenRun = () => Number(chooser.value);
  chooser.append(...meta.runs.map((run, index) => element("option", { value: index }, run.name)));
  byId("choose-run").hidden = !several;
  chooser.addEventListener("change", () => { shownGroup = null; fillDetails(); listGroups(); });

  async function fetched(path) {
    try {
      const answer = await fetch(path, { cache: "no-store" });
      return answer.ok ? await answer.json() : null;
    } catch {
      return null;  /* the server has gone; the events say so */
    }
  }

  async function load(run) {
    const range = zoomed ? { first: zoomed[0], last: zoomed[1] } : {};
    const view = meta.live ? await fetched(`view?${new URLSearchParams({ run, ...range })}`) : meta.embedded.views[run];
    if (!view) return;
    views[run] = view;
    if (!zoomed) showRange();
    for (const chart of charts) waiting.add(keyOf(chart));
    drawSeen();
    fillKeys();
    fillSummary();
    fillState();
    fillAlarms();
    if (run === chosenRun()) fillDetails();
  }

  function fillDetails() {
    const view = views[chosenRun()];
    if (!view) return;
    waiting.add("timeline");
    drawSeen();
    fillWorkers(view);
    fillLog(view);
  }

  const loadAll = () => Promise.all(meta.runs.map((_, run) => load(run)));

  /* One load at a time, and one more after it if something changed meanwhile. */
  let loading = false;
  const changed = new Set();
  async function refresh(run) {
    changed.add(run);
    if (loading) return;
    loading = true;
    while (changed.size) {
      const [next] = changed;
      changed.delete(next);
      await load(next);
      if (next === chosenRun()) await listGroups();
      await new Promise((resolve) => setTimeout(resolve, 200));
    }
    loading = false;
  }

  function listen() {
    const events = new EventSource("events");
    events.onopen = () => { byId("offline").hidden = true; };
    events.onerror = () => { byId("offline").hidden = false; };
    events.onmessage = (event) => {
      const news = JSON.parse(event.data);
      if (news.shape !== meta.shape) return location.reload();
      refresh(news.run);
    };
    addEventListener("pagehide", () => events.close());
  }

  /* --- keyboard and navigation ---------------------------------------------------------------------- */

  const links = [...document.querySelectorAll("nav a")];
  const sections = links.map((link) => document.querySelector(link.getAttribute("href")));
  function markSection() {
    const place = sections.findLastIndex((section) => section.getBoundingClientRect().top < 160);
    links.forEach((link, index) => (index === Math.max(place, 0) ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current")));
  }
  addEventListener("scroll", markSection, { passive: true });

  const KEYS = {
    j: () => step(1), k: () => step(-1), t: switchTheme, "?": () => byId("help").showModal(),
    "/": () => { filter.scrollIntoView(); filter.elements.update_min.focus(); },
    "+": () => zoomBy(0.5, 0), "=": () => zoomBy(0.5, 0), "-": () => zoomBy(2, 0), 0: () => zoomTo(null),
    ArrowLeft: () => zoomed && zoomBy(1, -0.25), ArrowRight: () => zoomed && zoomBy(1, 0.25),
  };
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea, dialog")) return;
    const section = sections[Number(event.key) - 1];
    const act = section ? () => links[Number(event.key) - 1].click() : KEYS[event.key];
    if (!act || (event.key.startsWith("Arrow") && !zoomed)) return;
    event.preventDefault();
    act();
  });
  byId("theme").addEventListener("click", switchTheme);
  byId("keys").addEventListener("click", KEYS["?"]);
  prefersDark.addEventListener("change", paintCharts);

  paintCharts();
  if (document.body.classList.contains("several")) byId("settings-title").textContent = "Settings that differ";
  await loadAll();
  charts.forEach((chart) => watcher.observe(chart));
  await listGroups();
  markSection();
  if (meta.live) listen();
  document.documentElement.dataset.ready = "true";
})();
