"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const { summary, curves, replay } = data;
const arms = [...new Set(summary.results.map((r) => r.arm))];
const armColor = (arm) => `--c${arms.indexOf(arm) % 6}`;
const byId = (id) => document.getElementById(id);

function showHeader() {
  const name = summary.config.name || "run";
  byId("title").textContent = name;
  const shown = summary.results.filter((r) => known(r.achievements.mean));
  const chosen = shown.filter((r) => r.mode === "dynamic").at(-1) || shown.at(-1);
  if (chosen) {
    const { mean, low, high } = chosen.achievements;
    const range = known(low) ? ` (${hundredths(low)} to ${hundredths(high)})` : "";
    byId("headline").append(
      make("b", {}, `${hundredths(mean)} achievements`), `${range} by `, make("b", {}, chosen.arm),
      `, planning on `, make("b", {}, percent(chosen.plan_rate.mean)), " of its turns.");
  }
  const total = Object.entries(summary.wall_seconds).filter(([stage]) => stage !== "compile");
  const facts = {
    commit: summary.commit || "unknown", hardware: summary.hardware,
    "wall time": duration(total.reduce((sum, [, seconds]) => sum + (seconds || 0), 0)),
    ...summary.versions,
  };
  for (const [key, value] of Object.entries(facts)) {
    byId("facts").append(make("div", {}, make("dt", {}, key), make("dd", {}, String(value))));
  }
}

function interval({ mean, low, high }, format = hundredths) {
  const cell = make("td", {}, format(mean));
  if (known(low)) cell.append(make("span", { class: "range" }, `[${format(low)}, ${format(high)}]`));
  return cell;
}

function achievementCell(result, highest) {
  const { mean, low, high } = result.achievements;
  const share = (v) => `${(100 * v) / highest}%`;
  const bar = make("span", { class: "bar" });
  if (known(mean)) {
    bar.append(make("i", { style: `width:${share(mean)};background:var(${armColor(result.arm)})` }));
  }
  if (known(low)) bar.append(make("b", { style: `left:${share(low)};width:${share(high - low)}` }));
  const cell = interval(result.achievements);
  cell.className = "left";
  cell.prepend(bar);
  return cell;
}

function showResults() {
  const counted = Object.keys(summary.results[0].counts);
  const head = ["arm", "plan mode", "achievements", "return", "turns with plan",
    "plan tokens a turn", "env steps", ...counted.map((name) => name.replaceAll("_", " ")), "episodes"];
  const row = make("tr");
  head.forEach((name, i) => row.append(make("th", i < 3 ? { class: "left" } : {}, name)));
  byId("result-table").append(make("thead", {}, row));
  const ends = summary.results.flatMap((r) => [r.achievements.mean, r.achievements.high]);
  const highest = Math.max(1, ...ends.filter(known));
  const body = make("tbody");
  summary.results.forEach((r, i) => {
    const first = i === 0 || summary.results[i - 1].arm !== r.arm;
    const dot = make("span", { class: "dot", style: `background:var(${armColor(r.arm)})` });
    body.append(make("tr", first && i ? { class: "first-of-arm" } : {},
      first ? make("td", { class: "left arm" }, dot, r.arm) : make("td", { class: "left" }),
      make("td", { class: "left" }, r.mode), achievementCell(r, highest), interval(r.return),
      interval(r.plan_rate, percent), interval(r.plan_tokens_per_turn), interval(r.steps, (v) => brief(known(v) ? Math.round(v) : v)),
      ...counted.map((name) => interval(r.counts[name])),
      make("td", {}, String(r.episodes))));
  });
  byId("result-table").append(body);
}

function showFrequency() {
  byId("frequency-chart").append(frequencyChart(summary.results, armColor));
  const legend = make("div", { class: "legend" });
  for (const arm of arms) {
    legend.append(make("span", {}, make("span", { class: "dot", style: `background:var(${armColor(arm)})` }), arm));
  }
  byId("frequency-chart").append(legend);
}

function showCurves() {
  for (const { stage, main, rest } of curves) {
    const group = make("div", {}, make("h3", {}, `${stage}, by ${stage === "ppo" ? "iteration" : "step"}`));
    const draw = (charts, into) => {
      const grid = make("div", { class: "charts" });
      for (const { name, lines } of charts) {
        const series = lines.map((points, i) => ({ points, color: i ? "--c1" : "--c0", dashed: i > 0 }));
        const title = lines.length > 1 ? `${name}, dashed: held out` : name;
        const chart = lineChart(title, series);
        if (chart) grid.append(chart);
      }
      into.append(grid);
    };
    draw(main, group);
    if (rest.length) {
      const more = make("details", {}, make("summary", {}, `${rest.length} more of ${stage}`));
      more.addEventListener("toggle", () => { if (more.open && more.children.length === 1) draw(rest, more); });
      group.append(more);
    }
    byId("curve-groups").append(group);
  }
  if (curves.length === 0) byId("curves").remove();
}

function showEvents() {
  const shown = summary.results.filter((r) => r.per_event);
  if (shown.length === 0) { byId("events").remove(); return; }
  const head = make("tr", {}, make("th", { class: "left" }, "achievement"));
  shown.forEach((r) => head.append(make("th", {}, r.arm, make("br"), r.mode)));
  const body = make("tbody");
  for (const name of Object.keys(shown[0].per_event)) {
    const row = make("tr", {}, make("td", { class: "left" }, name.replaceAll("_", " ")));
    for (const r of shown) {
      const rate = r.per_event[name];
      const shade = `background:color-mix(in srgb, var(${armColor(r.arm)}) ${Math.round(55 * (rate || 0))}%, transparent)`;
      row.append(make("td", {}, make("span", { class: "heat", style: shade },
        known(rate) ? `${Math.round(100 * rate)}%` : "–")));
    }
    body.append(row);
  }
  byId("event-table").append(make("thead", {}, head), body);
}

function showAbout() {
  const stages = Object.entries(summary.wall_seconds).filter(([, seconds]) => known(seconds));
  const longest = Math.max(1, ...stages.map(([, seconds]) => seconds));
  const table = make("table");
  for (const [stage, seconds] of stages) {
    const bar = make("span", { class: "bar" },
      make("i", { style: `width:${(100 * seconds) / longest}%;background:var(--c4)` }));
    const name = stage === "compile" ? "compile (within the stages)" : stage;
    table.append(make("tr", {}, make("td", { class: "left" }, name),
      make("td", { class: "left" }, bar, duration(seconds))));
  }
  byId("wall").append(table);
  byId("config").textContent = JSON.stringify(summary.config, null, 2);
}

showHeader(); showResults(); showFrequency(); showCurves(); showEvents(); showAbout();
if (replay) buildReplay(replay, byId("replay-body"));
else byId("replay").remove();
