// The view as a file of its own: a standalone SVG, to the clipboard or to the disk.
function standalone() {
  const root = shown.root.cloneNode(true);
  for (const g of root.querySelectorAll(".overlay, .chevron")) g.remove();
  for (const g of root.querySelectorAll("[class]")) g.classList.remove("dim", "same", "near", "chosen");
  for (const g of root.querySelectorAll(".fx_label")) g.removeAttribute("transform");
  for (const g of root.querySelectorAll("[style]")) g.removeAttribute("style");
  for (const [k, v] of [["width", r1(shown.width)], ["height", r1(shown.height)], ["viewBox", `0 0 ${r1(shown.width)} ${r1(shown.height)}`], ["role", "img"]]) root.setAttribute(k, v);
  const { light, dark } = DATA.css;
  const css = state.theme === "auto" ? `${light}@media (prefers-color-scheme:dark){${dark}}` : DATA.css[state.theme];
  const style = svg("style");
  style.textContent = css + (state.mode === "diff" ? BADGES : "");
  root.insertBefore(style, root.querySelector(".fx_ground") || root.firstChild);
  return `${new XMLSerializer().serializeToString(root)}\n`;
}
const BADGES = ".badge rect{fill:#1B2430}.badge text{fill:#FFFFFF;font-weight:bold}.badge_added rect{fill:#B04A00}";
async function copyText(text, what) {
  let done = false;
  try {
    await navigator.clipboard.writeText(text);
    done = true;
  } catch {
    done = copyOld(text);
  }
  say(done ? `Copied the ${what}` : `The browser did not allow copying the ${what}`);
  return done;
}
// Where a page from a file has no clipboard of its own.
function copyOld(text) {
  const area = el("textarea", { class: "unseen", "aria-hidden": "true" });
  const back = document.activeElement;
  area.value = text;
  document.body.append(area);
  area.select();
  let done = false;
  try {
    done = document.execCommand("copy");
  } catch {
    done = false;
  }
  area.remove();
  if (back) back.focus();
  return done;
}
function copySvg() {
  const text = standalone();
  return copyText(text, `picture as SVG (${Math.ceil(text.length / 1024)} kB)`);
}
function saveSvg() {
  const url = URL.createObjectURL(new Blob([standalone()], { type: "image/svg+xml" }));
  el("a", { href: url, download: "fxlora.svg" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
  say("Saved fxlora.svg");
}
