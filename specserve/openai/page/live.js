// Draws what /live/data says. Every number is computed by the server; here it only gets its place.
"use strict";

const SHORTEST_S = 60;
const KEPT_S = 300;
const LATE_S = 5;
const SVG = "http://www.w3.org/2000/svg";
const key = decodeURIComponent(location.hash.slice(1));

let frames = [];
let arrived = performance.now();

const element = (id) => document.getElementById(id);
const number = (value, digits = 1) => (value === null ? "–" : value.toFixed(digits));
const percent = (value) => (value === null ? "–" : `${(100 * value).toFixed(0)} %`);
const milliseconds = (value) => (value === null ? "–" : `${value.toFixed(1)} ms`);

function say(text, isBad) {
  element("status").textContent = text;
  element("status").classList.toggle("bad", isBad);
}

async function ask() {
  const since = frames.length ? frames[frames.length - 1].time_s : 0;
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  try {
    const answer = await fetch(`live/data?since=${since}`, { headers, cache: "no-store" });
    if (answer.status === 401) {
      say("this server asks for a key: open this page with #KEY at the end of its address", true);
      return;
    }
    take((await answer.json()).frames);
  } catch {
    // The endpoint does not answer; the silence is told below.
  }
  const silence = (performance.now() - arrived) / 1000;
  if (silence > LATE_S) say(`no reading for ${silence.toFixed(0)} s`, true);
}

function take(news) {
  if (!news.length) return;
  arrived = performance.now();
  frames = frames.concat(news);
  const now = frames[frames.length - 1];
  frames = frames.filter((frame) => frame.time_s > now.time_s - KEPT_S);
  say(now.steps_per_s ? "serving" : "idle", false);
  draw(now);
}

function draw(now) {
  for (const name of ["tokens_per_s", "acceptance_length", "draft_length"])
    element(name).textContent = number(now[name], name === "tokens_per_s" ? 0 : 2);
  for (const name of ["requests_running", "requests_waiting"])
    element(name).textContent = number(now[name], 0);
  for (const name of ["acceptance_rate", "kv_used"]) element(name).textContent = percent(now[name]);
  for (const name of ["measured_ms", "predicted_ms"]) element(name).textContent = number(now[name]);
  const available = now.draft_available;
  element("draft_available").textContent = available === null ? "–" : available ? "on" : "off";
  element("prediction_error").textContent = predictionError(now.prediction_error);

  chart("tokens_chart", ["tokens_per_s"]);
  chart("length_chart", ["acceptance_length", "draft_length"]);
  chart("step_chart", ["measured_ms", "predicted_ms"]);

  const outside = now.step_ms === null ? null : now.outside_share * now.step_ms;
  const parts = [["draft engine", now.draft_ms], ["target engine", now.verify_ms]];
  bars("shares", known([...parts, ["the rest", outside]]), milliseconds, now.step_ms);
  bars("decisions", sorted(now.decisions_per_s), number);
  bars("requests", sorted(now.requests_per_s), number);
  bars("positions", sorted(now.acceptance_by_position), percent, 1);
  attainment(now.attainment);
  const totals = [["preemptions", now.preemptions], ["draft failures", now.draft_failures]];
  const error = ["calibration error", now.calibration_error];
  table("totals", [
    ...known(totals).map(([name, value]) => [name, "", number(value, 0)]),
    ...known([error]).map(([name, value]) => [name, "", number(value, 3)]),
  ]);
}

// By call and quantile, such as "verify 0.5".
function predictionError(series) {
  const calls = {};
  for (const [name, error] of sorted(series)) {
    const [call, quantile] = name.split(" ");
    (calls[call] ??= []).push(`p${Math.round(100 * quantile)} ${percent(error)}`);
  }
  return Object.entries(calls)
    .map(([call, errors]) => `error of ${call}: ${errors.join(", ")}`)
    .join("; ");
}

const known = (rows) => rows.filter((row) => row[1] !== null);
const sorted = (series) =>
  Object.entries(series).sort(([a], [b]) => a.localeCompare(b, undefined, { numeric: true }));

// A line for each name; nothing where nothing happened.
function chart(id, names) {
  const svg = element(id);
  const { width, height } = svg.getBoundingClientRect();
  const [left, bottom, top] = [44, 16, 6];
  const end = frames[frames.length - 1].time_s;
  const span = Math.max(SHORTEST_S, end - frames[0].time_s);
  const highest = Math.max(...frames.flatMap((f) => names.map((name) => f[name] ?? 0)));
  const limit = roundUp(highest || 1);
  const x = (time) => left + (1 - (end - time) / span) * (width - left - 4);
  const y = (value) => top + (1 - value / limit) * (height - top - bottom);

  svg.replaceChildren();
  for (const share of [0, 0.5, 1]) {
    const at = y(share * limit);
    add(svg, "line", { class: "grid", x1: left, x2: width, y1: at, y2: at });
    const label = add(svg, "text", { x: left - 6, y: at + 4, "text-anchor": "end" });
    label.textContent = `${+(share * limit).toPrecision(3)}`;
  }
  for (const [share, anchor] of [[1, "start"], [0.5, "middle"], [0, "end"]]) {
    const place = { x: x(end - share * span), y: height - 2, "text-anchor": anchor };
    add(svg, "text", place).textContent = share ? `−${(share * span).toFixed(0)} s` : "now";
  }
  names.forEach((name, i) => {
    let path = "";
    let before = -Infinity;
    for (const frame of frames) {
      if (frame[name] === null) continue;
      const isNext = frame.time_s - before < 2.5;
      path += `${isNext ? "L" : "M"}${x(frame.time_s).toFixed(1)} ${y(frame[name]).toFixed(1)}`;
      before = frame.time_s;
    }
    add(svg, "path", { class: "ab"[i], d: path });
  });
}

function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}

function add(parent, name, attributes) {
  const child = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) child.setAttribute(key, value);
  return parent.appendChild(child);
}

function bars(id, rows, format, whole) {
  const limit = whole || Math.max(...rows.map((row) => row[1]), 1e-9);
  table(id, rows.map(([name, value]) => [name || "all", bar(value / limit), format(value)]));
}

function attainment(classes) {
  table("attainment", sorted(classes).map(([name, of]) => {
    const now = of.attained === null ? "" : ` (now ${percent(of.attained)})`;
    return [name || "no class", bar(of.total_attained ?? 0), percent(of.total_attained) + now];
  }));
}

function bar(share) {
  const element = document.createElement("div");
  element.className = "bar";
  element.style.width = `${Math.min(100, 100 * share)}%`;
  return element;
}

function table(id, rows) {
  const cells = rows.map(([name, bar, value]) => {
    const row = document.createElement("tr");
    for (const [className, content] of [["name", name], ["", bar], ["value", value]]) {
      const cell = row.insertCell();
      cell.className = className;
      cell.append(content);
    }
    return row;
  });
  if (!cells.length) {
    const row = document.createElement("tr");
    const cell = row.insertCell();
    cell.className = "none";
    cell.textContent = "nothing yet";
    cells.push(row);
  }
  element(id).replaceChildren(...cells);
}

async function watch() {
  await ask();
  setTimeout(watch, 1000);
}

watch();
