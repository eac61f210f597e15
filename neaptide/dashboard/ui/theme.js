// Light, dark, or as the system wishes.
import { signal } from "@preact/signals";

const dark = matchMedia("(prefers-color-scheme: dark)");
const wished = () => localStorage.getItem("theme") ?? (dark.matches ? "dark" : "light");
export const theme = signal(wished());
const apply = () => (document.documentElement.dataset.theme = theme.value);
apply();
dark.addEventListener("change", () => ((theme.value = wished()), apply()));

export function switchTheme() {
  localStorage.setItem("theme", theme.value === "dark" ? "light" : "dark");
  theme.value = wished();
  apply();
}
