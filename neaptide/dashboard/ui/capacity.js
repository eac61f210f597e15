// Demand against capacity, the replicas, and every decision with its reasons.
import { html } from "./html.js";
import { signal } from "@preact/signals";
import { Chart } from "./chart.js";
import { Hand } from "./hand.js";
import { Shadows } from "./shadows.js";
import { NONE, clock, count, money } from "./numbers.js";
import { ALL, chosen, column, flags, picked, replicas, state, times } from "./store.js";
import { said, t } from "./words.js";

const SHOWN = 200;
const holds = signal(true);
const mine = () => flags.value.filter((f) => chosen.value === ALL || f.model === chosen.value);
const visible = () => mine().filter((f) => holds.value || f.action !== "hold");

/** How sure the capacity is: as sure as of the least known of the shown models. */
function note() {
  const told = state.value.models.filter((m) => !m.remote && (chosen.value === ALL || m.model === chosen.value)).map((m) => m.learnt);
  if (!told.length || told.includes("")) return t("capacity.untold");
  return told.includes("assumed") ? t("capacity.assumed") : t("capacity.note");
}

function Demand() {
  const model = chosen.value;
  const n = (v) => count(v);
  const series = [
    { label: t("capacity.per_s"), colour: "good", step: true, format: n, fill: "good-soft", width: 1.5 },
    { label: t("capacity.arrivals"), colour: "main", format: n, width: 2 },
    { label: t("capacity.done"), colour: "dim", format: n, dash: [3, 3], width: 1 },
  ];
  const data = [times(), ...["capacity_per_s", "arrivals_per_s", "requests_per_s"].map((name) => column(model, name))];
  return html`<${Chart} title=${t("capacity.rate")} note=${note()} height=${240} series=${series} data=${data}
    format=${n} least=${1} flags=${visible()} chosen=${picked.value} pick=${(id) => (picked.value = id)} />`;
}

function AtOnce() {
  const model = chosen.value;
  const running = column(model, "running");
  const waiting = column(model, "waiting");
  const slots = column(model, "slots");
  const demand = running.map((v, at) => (v === null ? null : v + (waiting[at] ?? 0)));
  const n = (v) => count(v);
  const series = [
    { label: t("capacity.slots"), colour: "good", step: true, format: n, fill: "good-soft", width: 1.5 },
    { label: t("capacity.demand"), colour: "main", format: n, width: 2 },
    { label: t("capacity.waiting"), colour: "bad", format: n, fill: "bad-soft", width: 1.25 },
  ];
  const limit = slots.at(-1) === null || slots.at(-1) === undefined ? t("capacity.no_slots") : t("capacity.limited");
  return html`<${Chart} title=${t("capacity.title")} note=${limit} height=${150} series=${series} data=${[times(), slots, demand, waiting]}
    format=${n} least=${1} />`;
}

function Lanes() {
  const model = chosen.value;
  const n = (v) => count(v);
  const ready = column(model, "ready");
  const starting = column(model, "starting");
  const both = ready.map((v, at) => (v === null ? null : v + (starting[at] ?? 0)));
  const series = [
    { label: t("capacity.starting"), colour: "gold", step: true, format: n, fill: "gold-soft", width: 1 },
    { label: t("capacity.ready"), colour: "good", step: true, format: n, fill: "good-soft" },
    { label: t("capacity.wanted"), colour: "text", step: true, format: n, dash: [5, 4], width: 1.5 },
  ];
  return html`<${Chart} title=${t("capacity.replicas")} height=${130} series=${series} data=${[times(), both, ready, column(model, "wanted")]} format=${n} least=${1} />`;
}

function Words({ flag }) {
  if (!flag) return html`<p class="hint">${flags.value.length ? t("decision.pick") : t("decision.none")}</p>`;
  const currency = state.value.currency;
  const facts = [
    [t("decision.count"), flag.before === null ? NONE : `${flag.before} → ${flag.after}`],
    [t("decision.replicas"), flag.replicas.join(", ") || NONE],
    [t("decision.policy"), flag.policy || NONE],
    [t("decision.clamp"), flag.clamp ? t(`clamp.${flag.clamp}`) : NONE],
    [t("decision.cost"), flag.cost_per_hour === null ? t("decision.no_price") : `${money(flag.cost_per_hour, currency)} (${money(flag.cost_change_per_hour, currency, true)})`],
    ...Object.entries(flag.numbers).map(([name, v]) => [t(`number.${name}`), count(v)]),
  ];
  return html`<article class=${`words ${flag.action}`} aria-live="polite"><header><b>${t(`action.${flag.action}`)}</b> ${flag.model} <time>${clock(flag.t)}</time></header>
    ${said(flag).map((s) => html`<p>${s}</p>`)}
    <dl>${facts.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl></article>`;
}

function Decisions() {
  const rows = visible().slice(-SHOWN).reverse();
  return html`<div class="decisions"><header><h2>${t("decision.title")}</h2>
      <label><input type="checkbox" checked=${holds.value} onChange=${(e) => (holds.value = e.target.checked)} /> ${t("decision.holds")}</label></header>
    <${Words} flag=${flags.value.find((f) => f.id === picked.value)} />
    <ol>${rows.map((f) => html`<li key=${f.id}><button class=${`decision ${f.action}`} aria-pressed=${f.id === picked.value} onClick=${() => (picked.value = f.id)}>
      <time>${clock(f.t)}</time><b>${t(`action.${f.action}`)}</b><span>${said(f)[0]}</span></button></li>`)}</ol></div>`;
}

function Replicas() {
  const rows = replicas.value.filter((r) => chosen.value === ALL || r.model === chosen.value);
  if (!rows.length) return html`<p class="hint">${t("replica.none")}</p>`;
  const heads = ["id", "state", "running", "slots", "since", "error"];
  return html`<div class="scroll"><table><caption>${t("replica.title")}</caption>
    <thead><tr>${heads.map((name) => html`<th scope="col">${t(`replica.${name}`)}</th>`)}</tr></thead>
    <tbody>${rows.map((r) => html`<tr key=${r.id}><th scope="row">${r.id}</th><td>${t(`state.${r.state}`)}</td><td>${count(r.running)}</td><td>${count(r.slots)}</td>
      <td>${r.started_wall_s ? clock(r.started_wall_s) : NONE}</td><td>${r.error || NONE}</td></tr>`)}</tbody></table></div>`;
}

export function Capacity() {
  return html`<section class="card"><${Demand} /><${AtOnce} /><${Lanes} /></section>
    <section class="card"><${Decisions} /></section><section class="card"><${Hand} /></section>
    <section class="card"><${Shadows} /></section><section class="card"><${Replicas} /></section>`;
}
