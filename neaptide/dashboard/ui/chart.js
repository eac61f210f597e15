// A uPlot chart as a component: colours from the style sheet, one cursor for all, buttons for flags.
import { html } from "./html.js";
import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import { clock } from "./numbers.js";
import { language, said, t } from "./words.js";
import { range } from "./store.js";
import { theme } from "./theme.js";

const LEAST_S = 180; // a fresh page is not mostly empty
const SPAN = { "15m": 900, "24h": 86400 };
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const stepped = uPlot.paths.stepped({ align: 1 });

function line(s) {
  return {
    label: s.label,
    stroke: colour(s.colour),
    width: s.width ?? 1.75,
    dash: s.dash,
    fill: s.fill && colour(s.fill),
    paths: s.step ? stepped : undefined,
    points: { show: false },
    value: (u, v) => s.format(v),
    spanGaps: false,
  };
}

function axes(format, small) {
  const common = { stroke: colour("dim"), grid: { stroke: colour("grid"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
  const x = { ...common, values: (u, at, axis, space, step) => at.map((t) => clock(t, step < 60)), space: 90, size: small ? 0 : 26, show: !small };
  const y = { ...common, size: 62, values: (u, at) => at.map(format), space: small ? 20 : 34 };
  return [x, y];
}

function options(p, place) {
  return {
    width: place.clientWidth,
    height: p.height,
    cursor: { sync: { key: "page" }, y: false, points: { size: 6 } },
    legend: { live: true, markers: { width: 2 } },
    scales: {
      x: { time: true, range: (u, from, to) => [Math.max((to ?? 0) - SPAN[range.peek()], Math.min(from ?? 0, (to ?? 0) - LEAST_S)), to ?? 1] },
      y: { range: (u, from, to) => [0, Math.max(to ?? 0, p.least ?? 0) * 1.08 || 1] },
    },
    axes: axes(p.format, p.ribbon),
    series: [{ label: t("chart.time"), value: (u, v) => (v ? clock(v) : "") }, ...p.series.map(line)],
    bands: (p.bands ?? []).map((b) => ({ series: b.series, fill: colour(b.fill) })),
    hooks: { draw: [(u) => p.flags && placeFlags(u, p)] },
  };
}

/** One button a flag, above the plot where its time is; kept while it is there, so that it keeps the focus. */
function placeFlags(u, p) {
  const { min, max } = u.scales.x;
  const had = new Map([...u.over.querySelectorAll(".flag")].map((b) => [b.dataset.id, b]));
  for (const flag of p.flags()) {
    if (flag.t < min || flag.t > max) continue;
    const button = had.get(String(flag.id)) ?? flagButton(u, flag, p);
    had.delete(String(flag.id));
    button.className = `flag ${flag.action}${flag.id === p.chosen() ? " chosen" : ""}`;
    button.style.left = `${u.valToPos(flag.t, "x")}px`;
  }
  for (const gone of had.values()) gone.remove();
}

function flagButton(u, flag, p) {
  const button = document.createElement("button");
  button.type = "button";
  button.dataset.id = flag.id;
  button.title = button.ariaLabel = `${clock(flag.t)} ${said(flag)[0]}`;
  button.addEventListener("click", () => p.pick(flag.id));
  u.over.append(button);
  return button;
}

/** `data`: [times, ...values], a column for each of `series`. */
export function Chart(p) {
  const place = useRef(null);
  const plot = useRef(null);
  const latest = useRef(p);
  latest.current = p;
  useEffect(() => {
    const current = () => latest.current;
    const live = { ...p, flags: p.flags && (() => current().flags), chosen: () => current().chosen, pick: (id) => current().pick(id) };
    const u = (plot.current = new uPlot(options(live, place.current), p.data, place.current));
    const here = place.current;
    const sized = new ResizeObserver(() => here.isConnected && u.setSize({ width: here.clientWidth, height: p.height }));
    sized.observe(here);
    return () => (sized.disconnect(), u.destroy());
  }, [language.value, theme.value, p.series.length, p.height, p.title]);
  useEffect(() => plot.current?.setData(p.data));
  return html`<figure class="chart"><figcaption>${p.title}${p.note && html`<small>${p.note}</small>`}</figcaption>
    <div ref=${place} role="img" aria-label=${p.title}></div>${p.children}</figure>`;
}
