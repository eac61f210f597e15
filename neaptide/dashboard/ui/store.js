// What the page knows, as signals, and the one stream that keeps it fresh.
import { batch, signal } from "@preact/signals";

const SECONDS = 900;
export const ALL = ""; // the pseudo-model that is all of them

export const session = signal(null); // {token, header, chips}
export const state = signal(null); // {version, api, currency, models}
export const now = signal({}); // model -> row of the last seconds
export const minute = signal({}); // model -> row of the last minute
export const replicas = signal([]);
export const flags = signal([]); // oldest first
export const beat = signal(0); // rises when `recent` or `day` grew
export const link = signal("connecting"); // connecting | live | paused | lost
export const chosen = signal(ALL);
export const range = signal("15m"); // 15m | 24h
export const picked = signal(null); // number of the flag whose words are shown
export const shadows = signal(null); // rows: a day of a model under a policy

let fields = {}; // name -> place in a row
export let recent = { t: [], models: {} };
export let day = { t: [], models: {} };
let stream = null;
let retry = 0;

/** A field of a row; null where nobody told. */
export const field = (row, name) => row?.[fields[name]] ?? null;

/** A field's column over the chosen range: [times, values]. */
export function column(model, name) {
  const rows = range.value === "24h" ? day : recent;
  return rows.models[model]?.[fields[name]] ?? rows.t.map(() => null);
}

/** Of the rows shown. Rows are no signals: what reads their times is drawn again when they grow. */
export const times = () => (beat.value, (range.value === "24h" ? day : recent).t);
export const about = (model) => state.value?.models.find((m) => m.model === model);
export const busy = () => recent.models[ALL]?.[fields.arrivals_per_s]?.some((v) => v > 0) ?? false;

function learn(names) {
  fields = Object.fromEntries(names.map((name, at) => [name, at]));
}

/** Adds rows at the end; a model that is new or gone is filled up with nulls. */
function grow(t, models) {
  const width = Object.keys(fields).length;
  const had = recent.t.length;
  recent.t.push(...t);
  for (const name of new Set([...Object.keys(recent.models), ...Object.keys(models)])) {
    const columns = (recent.models[name] ??= Array.from({ length: width }, () => Array(had).fill(null)));
    columns.forEach((column, at) => column.push(...(models[name]?.[at] ?? t.map(() => null))));
  }
  const spare = recent.t.length - SECONDS;
  if (spare <= 0) return;
  recent.t.splice(0, spare);
  for (const columns of Object.values(recent.models)) for (const column of columns) column.splice(0, spare);
}

const heard = {
  snapshot(told) {
    learn(told.fields);
    grow(told.history.t, told.history.models);
    batch(() => {
      state.value = told.state;
      now.value = told.now;
      minute.value = told.minute;
      flags.value = told.flags;
      replicas.value = told.replicas;
      link.value = "live";
      beat.value++;
    });
    retry = 0;
  },
  tick(told) {
    if (told.t === null || told.t <= (recent.t.at(-1) ?? 0)) return;
    grow([told.t], Object.fromEntries(Object.entries(told.now).map(([m, row]) => [m, row.map((v) => [v])])));
    batch(() => {
      now.value = told.now;
      minute.value = told.minute;
      replicas.value = told.replicas;
      beat.value++;
    });
  },
  state: (told) => (state.value = told),
  flags: (told) => (flags.value = [...flags.value, ...told].slice(-500)),
};

function connect() {
  const last = recent.t.at(-1);
  stream = new EventSource(`/ui/live${last ? `?since=${last}` : ""}`);
  for (const [kind, take] of Object.entries(heard)) stream.addEventListener(kind, (e) => take(JSON.parse(e.data)));
  stream.onerror = lost;
}

async function lost() {
  disconnect("lost");
  try {
    if ((await fetch("/ui/session")).status === 401) return location.reload(); // the session is over
  } catch {
    // nobody answers: try again below
  }
  retry = Math.min(retry + 1, 5);
  setTimeout(() => link.value === "lost" && !document.hidden && connect(), retry * 1000);
}

function disconnect(why) {
  stream?.close();
  stream = null;
  link.value = why;
}

async function loadDay() {
  if (range.value !== "24h" || document.hidden) return;
  const told = await (await fetch("/ui/history")).json();
  learn(told.fields);
  day = told;
  beat.value++;
}

/** What the policies cost on the days that are kept; the stream does not carry it. */
export async function loadShadows() {
  if (document.hidden) return;
  const response = await fetch("/api/v1/scale/shadows?days=35");
  if (response.ok) shadows.value = (await response.json()).rows;
}

/** Control's clock, as last heard: the browser's may be wrong. What reads it is drawn again with each second. */
export const controlNow = () => (beat.value, recent.t.at(-1) ?? Date.now() / 1e3);

/** Begin; the stream rests while the tab is hidden. */
export async function start() {
  session.value = await (await fetch("/ui/session")).json();
  connect();
  document.addEventListener("visibilitychange", () => (document.hidden ? disconnect("paused") : stream ?? connect()));
  setInterval(loadDay, 60_000);
  range.subscribe(loadDay);
}

/** A call that may change something: it carries the session's token. */
export const call = (path, options = {}) =>
  fetch(path, { ...options, headers: { ...options.headers, [session.value.header]: session.value.token } });
