// How numbers look. Null is "nobody told" and looks like a dash, never like 0.
import { locale } from "./words.js";

export const NONE = "–";
const told = (v) => v !== null && v !== undefined && Number.isFinite(v);

export function count(v, digits = 3) {
  if (!told(v)) return NONE;
  const compact = Math.abs(v) >= 10000;
  const options = compact ? { notation: "compact", maximumSignificantDigits: 3 } : { maximumSignificantDigits: Math.max(digits, String(Math.trunc(v)).length) };
  return new Intl.NumberFormat(compact ? "en" : locale(), options).format(v);
}

export function span(s) {
  if (!told(s)) return NONE;
  if (s === 0) return "0 ms";
  if (s < 0.01) return `${(s * 1e3).toFixed(1)} ms`;
  if (s < 1) return `${(s * 1e3).toFixed(0)} ms`;
  return s < 100 ? `${s.toFixed(s < 10 ? 2 : 1)} s` : `${(s / 60).toFixed(1)} min`;
}

export const share = (v) => (told(v) ? `${(v * 100).toFixed(v > 0.9995 || v < 0.0005 ? 0 : v > 0.99 ? 2 : 1)} %` : NONE);

export function money(v, currency, signed = false) {
  if (!told(v)) return NONE;
  const small = Math.abs(v) < 1 && v !== 0;
  const options = { style: "currency", currency, currencyDisplay: "narrowSymbol", signDisplay: signed ? "exceptZero" : "auto" };
  const digits = small ? { maximumSignificantDigits: 2 } : { maximumFractionDigits: 2 };
  try {
    return new Intl.NumberFormat(locale(), { ...options, ...digits }).format(v);
  } catch {
    return `${v.toFixed(2)} ${currency}`;
  }
}

const UNITS = [["day", 86400], ["hour", 3600], ["minute", 60], ["second", 1]];
const unit = (n, name) => new Intl.NumberFormat(locale(), { style: "unit", unit: name, unitDisplay: "short" }).format(n);

/** Whole seconds as people say them, in the two largest units: "1 hr 5 min". */
export function lasting(s) {
  const largest = UNITS.findIndex(([, size]) => s >= size);
  const [[name, size], next] = UNITS.slice(largest).concat([undefined]);
  const rest = next ? Math.floor((s % size) / next[1]) : 0;
  return unit(Math.floor(s / size), name) + (rest ? ` ${unit(rest, next[0])}` : "");
}

/** A time, with its day where that is not today. */
export const moment = (wall) =>
  new Date(wall * 1e3).toDateString() === new Date().toDateString() ? clock(wall, false) : new Date(wall * 1e3).toLocaleString(locale(), { dateStyle: "medium", timeStyle: "short" });

export const clock = (wall, seconds = true) =>
  new Date(wall * 1e3).toLocaleTimeString(locale(), { hour: "2-digit", minute: "2-digit", second: seconds ? "2-digit" : undefined, hour12: false });
