// Tiles, traffic against goodput, latencies, the cost ribbon, and a line a model.
import { html } from "./html.js";
import { Chart } from "./chart.js";
import { NONE, count, money, share, span } from "./numbers.js";
import { ALL, about, busy, chosen, column, field, minute, now, state, times } from "./store.js";
import { t } from "./words.js";

function Tile({ name, value, note, bad }) {
  return html`<div class=${`tile${bad ? " bad" : ""}`}><span>${name}</span><strong>${value}</strong><small>${note}</small></div>`;
}

function Tiles() {
  const row = minute.value[chosen.value];
  const get = (name) => field(row, name);
  const currency = state.value.currency;
  const only = state.value.models.length === 1 ? state.value.models[0] : null;
  const slo = (about(chosen.value) ?? only)?.slo;
  const [ttft95, ttft50, mean] = [get("ttft_p95_s"), get("ttft_p50_s"), get("ttft_s")];
  const quantiles = ttft95 !== null;
  const spend = get("token_spend_per_hour");
  const late = slo && ttft95 > slo.ttft_s;
  const missed = slo && get("share_in_slo") !== null && get("share_in_slo") < slo.attainment;
  return html`<div class="tiles">
    <${Tile} name=${t("tile.requests")} value=${count(get("requests_per_s"))}
      note=${t("tile.requests.note", { tokens: count(get("tokens_per_s")), errors: count(get("errors_per_s")) })} />
    <${Tile} name=${quantiles ? "TTFT p95" : t("tile.ttft_mean")} value=${span(quantiles ? ttft95 : mean)} bad=${late}
      note=${quantiles ? t("tile.ttft.note", { p50: span(ttft50) }) : t("tile.mean.note")} />
    <${Tile} name=${get("tpot_p95_s") === null ? "TPOT" : "TPOT p95"} value=${span(get("tpot_p95_s") ?? get("tpot_s"))}
      note=${t("tile.tpot.note", { middle: span(get("tpot_s")) })} />
    <${Tile} name=${t("tile.goodput")} value=${share(get("share_in_slo"))} bad=${missed}
      note=${slo ? t("tile.goodput.note", { ttft: span(slo.ttft_s), tpot: span(slo.tpot_s) }) : t("tile.goodput.all")} />
    <${Tile} name=${t("tile.cost")} value=${money(get("cost_per_hour"), currency)}
      note=${get("cost_per_hour") === null ? t("tile.cost.none") : spend === null ? t("tile.cost.replicas") : t("tile.cost.note", { spend: money(spend, currency) })} />
    <${Tile} name=${t("tile.mtok")} value=${money(get("cost_per_mtok"), currency)}
      note=${get("cost_per_mtok") === null ? t("tile.mtok.none") : t("tile.mtok.note")} />
  </div>`;
}

function Traffic() {
  const model = chosen.value;
  const all = column(model, "requests_per_s");
  const good = column(model, "good_per_s");
  const rate = (v) => count(v);
  const series = [
    { label: t("chart.ended"), colour: "bad", format: rate, width: 1.25 },
    { label: t("chart.good"), colour: "good", format: rate, fill: "good-soft" },
    { label: t("chart.arrivals"), colour: "dim", format: rate, dash: [4, 4], width: 1 },
  ];
  return html`<${Chart} title=${t("chart.traffic")} note=${t("chart.traffic.note")} height=${230} series=${series}
    data=${[times(), all, good, column(model, "arrivals_per_s")]} bands=${[{ series: [1, 2], fill: "bad-soft" }]} format=${rate} least=${0.5} />`;
}

function Latency() {
  const model = chosen.value;
  const series = [
    { label: "TTFT p95", colour: "warm", format: span },
    { label: "TTFT p50", colour: "main", format: span },
    { label: t("chart.ttft_mean"), colour: "dim", format: span, dash: [2, 3] },
    { label: "TPOT p95", colour: "violet", format: span },
  ];
  const data = [times(), ...["ttft_p95_s", "ttft_p50_s", "ttft_s", "tpot_p95_s"].map((name) => column(model, name))];
  return html`<${Chart} title=${t("chart.latency")} note=${t("chart.latency.note")} height=${190} series=${series} data=${data} format=${span} least=${0.01} />`;
}

function Cost() {
  const cost = column(chosen.value, "cost_per_hour");
  const format = (v) => money(v, state.value.currency);
  if (!cost.some((v) => v !== null)) return html`<p class="hint">${t("cost.empty")}</p>`;
  return html`<${Chart} title=${t("chart.cost")} height=${110} series=${[{ label: t("chart.cost"), colour: "gold", fill: "gold-soft", step: true, format }]}
    data=${[times(), cost]} format=${format} least=${0.1} />`;
}

function Line({ model }) {
  const row = minute.value[model.model];
  const get = (name) => field(row, name);
  const here = now.value[model.model];
  const at = (name) => count(field(here, name));
  const extra = field(here, "starting") ? `+${field(here, "starting")}` : "";
  return html`<tr class=${model.failing ? "bad" : ""}>
    <th scope="row"><button class="plain" onClick=${() => (chosen.value = model.model)}>${model.model}</button>
      ${model.failing && html`<small>${model.failing}</small>`}</th>
    <td>${count(get("requests_per_s"))}</td><td>${span(get("ttft_p50_s") ?? get("ttft_s"))}</td><td>${span(get("ttft_p95_s"))}</td>
    <td>${span(get("tpot_s"))}</td><td>${share(get("share_in_slo"))}</td><td>${count(get("tokens_per_s"))}</td>
    <td>${count(get("errors_per_s"))}</td><td>${at("running")}</td><td>${at("waiting")}</td>
    <td>${at("ready")}${extra} / ${model.remote ? NONE : at("wanted")}</td><td>${money(get("cost_per_hour"), state.value.currency)}</td></tr>`;
}

function Models() {
  const heads = ["model", "requests", "ttft50", "ttft95", "tpot", "goodput", "tokens", "errors", "running", "waiting", "replicas", "cost"];
  return html`<div class="scroll"><table><caption>${t("models.title")}</caption>
    <thead><tr>${heads.map((name) => html`<th scope="col">${t(`models.${name}`)}</th>`)}</tr></thead>
    <tbody>${state.value.models.map((m) => html`<${Line} model=${m} key=${m.model} />`)}</tbody></table></div>`;
}

export function Overview() {
  const quiet = field(now.value[ALL], "arrivals_per_s") === null ? t("empty.untold") : busy() ? null : t("empty.quiet");
  return html`<${Tiles} />${quiet && html`<p class="hint">${quiet}</p>`}
    <section class="card"><${Traffic} /><${Latency} /><${Cost} /></section>
    <section class="card"><${Models} /></section>`;
}
