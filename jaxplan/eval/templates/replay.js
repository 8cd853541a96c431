"use strict";

// Tiles: a ground, and a figure drawn in a unit square ---------------------------------

const GROUND = {
  "invalid": "#0b0d12", "out of bounds": "#0b0d12", "grass": "#6fae54", "water": "#3d85d8",
  "stone": "#8b8f98", "tree": "#6fae54", "wood": "#a9794a", "path": "#c9b08a", "coal": "#8b8f98",
  "iron": "#8b8f98", "diamond": "#8b8f98", "table": "#a9794a", "furnace": "#5d6069",
  "sand": "#e6d59a", "lava": "#e4572e", "plant": "#6fae54", "ripe plant": "#6fae54",
  "zombie": "#6fae54", "cow": "#6fae54", "skeleton": "#c9b08a", "arrow": "#c9b08a",
};

function dots(c, color, radius, places) {
  c.fillStyle = color;
  for (const [x, y] of places) { c.beginPath(); c.arc(x, y, radius, 0, 7); c.fill(); }
}

function strokes(c, color, width, lines) {
  c.strokeStyle = color; c.lineWidth = width; c.lineCap = "round";
  for (const line of lines) {
    c.beginPath();
    line.forEach(([x, y], i) => (i ? c.lineTo(x, y) : c.moveTo(x, y)));
    c.stroke();
  }
}

const SPECKS = [[0.2, 0.25], [0.7, 0.18], [0.45, 0.55], [0.82, 0.7], [0.2, 0.8]];
const cracks = (c) => strokes(c, "#74787f", 0.035, [
  [[0.1, 0.35], [0.35, 0.3], [0.45, 0.45]], [[0.6, 0.75], [0.75, 0.62], [0.92, 0.68]],
]);
const ore = (color) => (c) => {
  cracks(c);
  dots(c, color, 0.09, [[0.3, 0.55], [0.55, 0.28], [0.72, 0.5], [0.45, 0.78], [0.2, 0.2]]);
};

function person(c, body, head, eyes) {
  c.fillStyle = body; c.beginPath(); c.roundRect(0.28, 0.42, 0.44, 0.46, 0.1); c.fill();
  dots(c, head, 0.2, [[0.5, 0.3]]);
  dots(c, eyes, 0.04, [[0.43, 0.29], [0.57, 0.29]]);
}

const FIGURE = {
  "grass": (c) => dots(c, "#5f9b47", 0.04, SPECKS),
  "sand": (c) => dots(c, "#d3bf7d", 0.035, SPECKS),
  "path": (c) => dots(c, "#b59a72", 0.04, SPECKS),
  "stone": cracks,
  "coal": ore("#23262d"), "iron": ore("#f0c9a0"),
  "diamond": (c) => {
    cracks(c);
    c.fillStyle = "#f4fbff";
    for (const [x, y] of [[0.32, 0.4], [0.65, 0.32], [0.55, 0.7]]) {
      c.beginPath(); c.moveTo(x, y - 0.14); c.lineTo(x + 0.12, y); c.lineTo(x, y + 0.14);
      c.lineTo(x - 0.12, y); c.fill();
    }
  },
  "water": (c) => strokes(c, "#8ebdf0", 0.045, [0.3, 0.65].map((y) => (
    [[0.12, y], [0.28, y - 0.07], [0.44, y], [0.6, y - 0.07], [0.76, y]]))),
  "lava": (c) => strokes(c, "#ffc24a", 0.06, [0.3, 0.65].map((y) => (
    [[0.12, y], [0.28, y - 0.09], [0.44, y], [0.6, y - 0.09], [0.76, y]]))),
  "tree": (c) => {
    c.fillStyle = "#6d4a2c"; c.fillRect(0.42, 0.6, 0.16, 0.3);
    dots(c, "#2d6b34", 0.24, [[0.36, 0.48], [0.64, 0.48]]);
    dots(c, "#37803f", 0.25, [[0.5, 0.32]]);
  },
  "wood": (c) => strokes(c, "#86592f", 0.05, [[[0, 0.33], [1, 0.33]], [[0, 0.66], [1, 0.66]]]),
  "table": (c) => {
    c.fillStyle = "#6d4a2c"; c.fillRect(0.12, 0.12, 0.76, 0.76);
    c.fillStyle = "#c9925b"; c.fillRect(0.18, 0.18, 0.64, 0.64);
    strokes(c, "#6d4a2c", 0.05, [[[0.18, 0.5], [0.82, 0.5]], [[0.5, 0.18], [0.5, 0.82]]]);
  },
  "furnace": (c) => {
    c.fillStyle = "#3b3e46"; c.fillRect(0.14, 0.14, 0.72, 0.72);
    c.fillStyle = "#ff8f2e"; c.beginPath(); c.arc(0.5, 0.68, 0.2, Math.PI, 0); c.fill();
  },
  "plant": (c) => strokes(c, "#2d6b34", 0.07, [
    [[0.5, 0.85], [0.5, 0.45]], [[0.5, 0.62], [0.3, 0.42]], [[0.5, 0.55], [0.7, 0.35]]]),
  "ripe plant": (c) => {
    FIGURE["plant"](c);
    dots(c, "#e2365b", 0.11, [[0.3, 0.38], [0.7, 0.32], [0.5, 0.3]]);
  },
  "zombie": (c) => person(c, "#2f5f3a", "#4f8f4a", "#101312"),
  "skeleton": (c) => {
    person(c, "#ece9df", "#f8f6ef", "#1c1c1c");
    strokes(c, "#8d8a80", 0.035, [0.54, 0.66, 0.78].map((y) => [[0.34, y], [0.66, y]]));
  },
  "cow": (c) => {
    c.fillStyle = "#f4efe6"; c.beginPath(); c.roundRect(0.14, 0.34, 0.6, 0.36, 0.12); c.fill();
    dots(c, "#5b3a26", 0.09, [[0.3, 0.46], [0.52, 0.57]]);
    c.fillStyle = "#5b3a26"; c.beginPath(); c.roundRect(0.68, 0.26, 0.22, 0.26, 0.08); c.fill();
    c.fillStyle = "#d8d0c2"; c.fillRect(0.2, 0.68, 0.1, 0.18); c.fillRect(0.58, 0.68, 0.1, 0.18);
  },
  "arrow": (c) => strokes(c, "#4a3322", 0.06, [
    [[0.2, 0.8], [0.8, 0.2]], [[0.56, 0.22], [0.8, 0.2], [0.78, 0.44]]]),
};

function drawTile(context, name, x, y, size) {
  context.save();
  context.translate(x, y); context.scale(size, size);
  context.fillStyle = GROUND[name] || "#b04ac0";
  context.fillRect(0, 0, 1.01, 1.01);
  if (FIGURE[name]) FIGURE[name](context);
  else if (!GROUND[name]) {
    context.fillStyle = "#fff"; context.font = "0.5px sans-serif"; context.textAlign = "center";
    context.fillText(name.slice(0, 2), 0.5, 0.68);
  }
  context.restore();
}

function drawPlayer(context, facing, x, y, size) {
  const turn = { n: 0, e: 1, s: 2, w: 3 }[facing] || 0;
  context.save();
  context.translate(x + size / 2, y + size / 2); context.rotate((turn * Math.PI) / 2);
  context.scale(size, size);
  context.fillStyle = "#ffffff"; context.strokeStyle = "#10131a"; context.lineWidth = 0.06;
  context.lineJoin = "round";
  context.beginPath(); context.moveTo(0, -0.4); context.lineTo(0.32, 0.34); context.lineTo(0, 0.2);
  context.lineTo(-0.32, 0.34); context.closePath(); context.fill(); context.stroke();
  context.restore();
}

function drawBoard(canvas, frame, tileNames) {
  const rows = frame.view.length, columns = frame.view[0].length;
  const size = canvas.width / columns;
  const context = canvas.getContext("2d");
  frame.view.forEach((row, r) => row.forEach((code, k) => {
    drawTile(context, tileNames[code] || "invalid", k * size, r * size, size);
  }));
  context.fillStyle = `rgba(8, 12, 34, ${0.6 * (1 - Math.max(0, Math.min(1, frame.light)))})`;
  context.fillRect(0, 0, canvas.width, canvas.height);
  drawPlayer(context, frame.facing, Math.floor(columns / 2) * size, Math.floor(rows / 2) * size, size);
}

// Tiles around a player in the middle, with vitals and inventory.
function boardPicture(replay) {
  const { frames } = replay, first = frames[0];
  const scale = Math.min(3, Math.max(2, window.devicePixelRatio || 1));
  const board = make("canvas", { width: 468 * scale, height: (468 * scale * first.view.length) / first.view[0].length });
  const tag = make("span", { class: "tag" });
  const vitals = make("div", { class: "vitals" }), inventory = make("div", { class: "chips" });
  const legend = make("div", { class: "tiles" });
  const met = new Set(frames.flatMap((frame) => frame.view.flat()));
  replay.tile_names.forEach((name, code) => {
    if (!met.has(code) || code < 2) return;
    const sample = make("canvas", { width: 54, height: 54 });
    drawTile(sample.getContext("2d"), name, 0, 0, 54);
    legend.append(make("span", {}, sample, name));
  });

  function show(frame) {
    drawBoard(board, frame, replay.tile_names);
    const state = [frame.sleeping && "asleep", frame.light < 0.5 && "dark"].filter(Boolean);
    tag.hidden = state.length === 0; tag.textContent = state.join(", ");
    vitals.replaceChildren(...Object.entries(frame.vitals).flatMap(([name, value]) => {
      const track = make("div", { class: "track" });
      for (let k = 0; k < 9; k++) {
        track.append(make("i", k < value ? { style: `background:${VITAL_COLOR[name] || "var(--accent)"}` } : {}));
      }
      return [make("span", {}, name), track, make("span", {}, String(value))];
    }));
    const carried = Object.entries(frame.inventory).filter(([, count]) => count > 0);
    inventory.replaceChildren(...carried.map(([name, count]) => make("span", {}, `${words(name)} ${count}`)));
    if (carried.length === 0) inventory.append(make("span", { class: "none" }, "empty"));
  }

  const beside = [make("div", { class: "two" }, panel("Vitals", vitals), panel("Inventory", inventory))];
  return { show, parts: [make("div", { class: "board" }, board, tag)], legend: [legend], beside };
}

// A tree with the first frame's node on top; what is in sight is drawn in ink.
function graphPicture({ graph, frames }) {
  const near = Array.from({ length: graph.nodes }, () => []);
  for (const [a, b] of graph.edges) { near[a].push(b); near[b].push(a); }
  const place = [];
  let leaves = 0, deepest = 0;
  (function arrange(node, parent, depth) {
    const children = near[node].filter((other) => other !== parent);
    children.forEach((child) => arrange(child, node, depth + 1));
    const middle = children.reduce((sum, child) => sum + place[child][0], 0) / children.length;
    place[node] = [children.length ? middle : leaves++, depth];
    deepest = Math.max(deepest, depth);
  })(frames[0].at, -1, 0);
  const at = (node) => [24 + (420 * (place[node][0] + 0.5)) / leaves, 24 + (312 * place[node][1]) / deepest];

  const svg = makeSvg("svg", { viewBox: "0 0 468 360", role: "img", "aria-label": "the graph" });
  const lines = graph.edges.map(([a, b]) => {
    const [x1, y1] = at(a), [x2, y2] = at(b);
    return svg.appendChild(makeSvg("line", { x1, y1, x2, y2, "stroke-width": 2 }));
  });
  const marks = place.map((_, node) => {
    const [cx, cy] = at(node);
    const mark = svg.appendChild(makeSvg("circle", { cx, cy, r: 13, "stroke-width": 3 }));
    const label = makeSvg("text", { x: cx, y: cy + 4.5, "text-anchor": "middle" }, String(node));
    return [mark, svg.appendChild(label)];
  });

  function show(frame) {
    const seen = new Set(frame.visible);
    const color = (inSight) => `var(${inSight ? "--ink" : "--line"})`;
    lines.forEach((line, k) => line.setAttribute("stroke", color(graph.edges[k].every((n) => seen.has(n)))));
    marks.forEach(([mark, label], node) => {
      const here = node === frame.at;
      mark.setAttribute("fill", here ? "var(--accent)" : "var(--card)");
      mark.setAttribute("stroke", node === graph.target ? "var(--gold)" : color(seen.has(node)));
      label.setAttribute("style", `fill:${here ? "var(--card)" : seen.has(node) ? "var(--ink)" : "var(--quiet)"}`);
    });
  }

  const legend = make("p", { class: "keys" }, "Blue: the player. Gold: the target. Grey: out of sight.");
  return { show, parts: [svg], legend: [legend], beside: [] };
}

// By the key in a replay that a picture is drawn from; a world without one has only words.
const PICTURES = { tile_names: boardPicture, graph: graphPicture };

function pictureOf(replay) {
  const kind = Object.keys(PICTURES).find((key) => key in replay);
  return kind ? PICTURES[kind](replay) : { show: () => {}, parts: [], legend: [], beside: [] };
}

// The player of the episode -------------------------------------------------------------

const VITAL_COLOR = { health: "var(--bad)", food: "var(--gold)", drink: "var(--c0)", energy: "var(--good)" };
const words = (name) => name.replaceAll("_", " ");
const panel = (title, content) => make("div", { class: "panel" }, make("h3", {}, title), content);

function buildReplay(replay, body) {
  const { frames } = replay;
  const first = frames[0];
  const picture = pictureOf(replay);
  const play = make("button", { class: "primary", title: "space" }, "Play");
  const button = (label, title, action) => {
    const element = make("button", { title }, label);
    element.addEventListener("click", action);
    return element;
  };
  const speed = make("select", { title: "frames per second" });
  for (const rate of [2, 5, 10, 30]) speed.append(make("option", { value: rate }, `${rate}/s`));
  speed.value = "5";
  const where = make("span", { class: "where" });
  const slider = make("input", { type: "range", min: 0, max: frames.length - 1, value: 0, "aria-label": "frame" });
  const strip = make("canvas", { id: "strip", height: 68 });
  const plan = make("div", { class: "plan" }), act = make("div", { class: "act" });
  const checks = make("div", { class: "checks" }), observation = make("pre", { id: "observation" });
  const unlockedAt = new Map();
  frames.forEach((frame) => frame.unlocked.forEach((name) => unlockedAt.set(name, frame.step)));

  let now = 0, timer = null;

  function show(index) {
    now = Math.max(0, Math.min(frames.length - 1, index));
    const frame = frames[now];
    picture.show(frame);
    slider.value = now;
    where.textContent = `step ${frame.step} of ${frames.at(-1).step}`;
    plan.className = frame.planned_now ? "plan new" : "plan";
    plan.replaceChildren(
      make("small", {}, frame.planned_now ? "new plan, said in this turn" : "plan in force"),
      make("p", {}, frame.plan || "no plan"));
    act.replaceChildren(
      make("span", {}, "action", make("b", {}, words(frame.action))),
      make("span", {}, "reward", make("b", {}, frame.reward.toFixed(1))),
      make("span", {}, "achievements", make("b", {}, `${frame.achievements} of ${replay.event_names.length}`)));
    checks.replaceChildren(...replay.event_names.map((name) => {
      const step = unlockedAt.get(name), got = step !== undefined && step <= frame.step;
      const kind = got ? (step === frame.step ? "got now" : "got") : "";
      return make("div", { class: kind }, words(name), make("small", {}, got ? `step ${step}` : ""));
    }));
    observation.textContent = frame.observation || "nothing: the player is asleep and is not asked";
    drawStrip();
  }

  function drawStrip() {
    const context = strip.getContext("2d"), style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    strip.width = strip.clientWidth * 2 || 936;
    const x = (index) => 14 + (index / Math.max(1, frames.length - 1)) * (strip.width - 28);
    context.fillStyle = color("--soft"); context.fillRect(14, 26, strip.width - 28, 16);
    frames.forEach((frame, index) => {
      if (frame.planned_now) { context.fillStyle = color("--plan"); context.fillRect(x(index) - 1.5, 26, 3, 16); }
    });
    frames.forEach((frame, index) => {
      if (frame.unlocked.length) {
        context.fillStyle = color("--gold");
        context.beginPath(); context.arc(x(index), 13, 7, 0, 7); context.fill();
      }
    });
    context.fillStyle = color("--ink"); context.fillRect(x(now) - 1.5, 2, 3, 58);
  }

  function stop() { clearInterval(timer); timer = null; play.textContent = "Play"; }
  function start() {
    if (now === frames.length - 1) show(0);
    play.textContent = "Pause";
    timer = setInterval(() => (now < frames.length - 1 ? show(now + 1) : stop()), 1000 / Number(speed.value));
  }
  const toggle = () => (timer ? stop() : start());
  const go = (index) => { stop(); show(index); };
  const seek = (direction, wanted) => {
    let index = now + direction;
    while (frames[index] && !wanted(frames[index])) index += direction;
    if (frames[index]) go(index);
  };
  const isPlan = (frame) => frame.planned_now, isUnlock = (frame) => frame.unlocked.length > 0;

  play.addEventListener("click", toggle);
  speed.addEventListener("change", () => { if (timer) { stop(); start(); } });
  slider.addEventListener("input", () => go(Number(slider.value)));
  strip.addEventListener("click", (event) => {
    const box = strip.getBoundingClientRect();
    go(Math.round(((event.clientX - box.left - 7) / (box.width - 14)) * (frames.length - 1)));
  });
  const keys = {
    " ": toggle, ArrowLeft: () => go(now - 1), ArrowRight: () => go(now + 1), Home: () => go(0),
    End: () => go(frames.length - 1), p: () => seek(1, isPlan), P: () => seek(-1, isPlan),
    u: () => seek(1, isUnlock), U: () => seek(-1, isUnlock),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (["SELECT", "SUMMARY"].includes(event.target.tagName) || !keys[event.key]) return;
    event.preventDefault(); keys[event.key]();
  });
  window.addEventListener("resize", drawStrip);

  const planned = frames.filter(isPlan).length;
  body.append(
    make("p", { class: "note" }, `Arm ${replay.arm}, plan mode ${replay.mode}, world seed ${replay.seed}: `
      + `${frames.at(-1).achievements} achievements in ${frames.at(-1).step - first.step} steps, `
      + `${planned} plans.`),
    make("div", { class: "stage" },
      make("div", {},
        ...picture.parts,
        slider, strip,
        make("div", { class: "controls" }, play,
          button("‹", "one step back: left arrow", () => go(now - 1)),
          button("›", "one step on: right arrow", () => go(now + 1)),
          button("next plan", "p; shift p: the one before", () => seek(1, isPlan)),
          button("next unlock", "u; shift u: the one before", () => seek(1, isUnlock)),
          speed, where),
        make("p", { class: "keys" }, make("kbd", {}, "space"), " play  ", make("kbd", {}, "←"), " ",
          make("kbd", {}, "→"), " step  ", make("kbd", {}, "p"), " plan  ", make("kbd", {}, "u"),
          " unlock. The strip: violet a new plan, gold an achievement."),
        ...picture.legend),
      make("div", {},
        panel("Plan", plan), panel("Turn", act),
        ...picture.beside,
        panel("What the agent reads", observation),
        panel("Achievements", checks))));
  show(0);
}
