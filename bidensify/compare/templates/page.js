"use strict";
// Sortable tables, light and dark, and the viewer. Texts from the page's data go in as text, never as HTML.

function numberIn(text) {
  const found = text.replace(/[,\s]/g, "").match(/^[-+−]?\d+(\.\d+)?(e[-+]?\d+)?/i);
  return found ? parseFloat(found[0].replace("−", "-")) : null;
}

function sortBy(table, column, descending) {
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => {
    const text = row.cells[column].textContent.trim();
    return { row, text, value: numberIn(text), none: text === "–" || text === "" };
  });
  rows.sort((a, b) => {
    if (a.none !== b.none) return a.none ? 1 : -1; // what was not measured stays below, either way
    const order = a.value !== null && b.value !== null ? a.value - b.value : a.text.localeCompare(b.text);
    return descending ? -order : order;
  });
  rows.forEach(({ row }) => body.append(row));
  [...table.tHead.rows[0].cells].forEach((cell, number) => {
    if (number === column) cell.setAttribute("aria-sort", descending ? "descending" : "ascending");
    else cell.removeAttribute("aria-sort");
  });
}

document.querySelectorAll("table[data-sortable]").forEach((table) => {
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = cell.textContent;
    button.addEventListener("click", () => {
      const now = cell.getAttribute("aria-sort");
      // Figures are looked at from the largest down, names from A on.
      const first = numberIn(table.tBodies[0].rows[0]?.cells[column].textContent.trim() ?? "") !== null;
      sortBy(table, column, now ? now === "ascending" : first);
    });
    cell.replaceChildren(button);
  });
});

const theme = document.getElementById("theme");
theme.hidden = false;
const dark = matchMedia("(prefers-color-scheme: dark)");
function isDark() {
  return (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
}
function nameTheme() {
  theme.textContent = isDark() ? "Light" : "Dark";
}
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  nameTheme();
});
dark.addEventListener("change", nameTheme);
nameTheme();

document.querySelectorAll(".viewer").forEach((viewer) => {
  const { names, shots } = JSON.parse(viewer.querySelector(".shots").textContent);
  const part = (name) => viewer.querySelector("." + name);
  const stage = part("stage");
  const state = { left: viewer.dataset.left, right: viewer.dataset.right, shot: 0, split: 50, errors: false };
  if (!names.includes(state.left)) state.left = names[0];
  if (!names.includes(state.right)) state.right = names[names.length - 1];

  for (const side of ["left", "right"]) {
    const select = part("pick-" + side);
    names.forEach((name) => select.add(new Option(name, name)));
    select.addEventListener("change", () => { state[side] = select.value; show(); });
  }
  const strip = part("strip");
  shots.forEach((shot, number) => {
    const button = document.createElement("button");
    const image = document.createElement("img");
    button.type = "button";
    button.title = shot.caption;
    image.alt = shot.caption;
    image.src = shot.pictures[names[0]];
    button.append(image);
    button.addEventListener("click", () => { state.shot = number; show(); });
    strip.append(button);
  });
  part("pick-errors").addEventListener("change", (event) => { state.errors = event.target.checked; show(); });
  part("under").addEventListener("load", (event) => {
    const { naturalWidth: width, naturalHeight: height } = event.target;
    stage.style.aspectRatio = `${width} / ${height}`;
    stage.style.maxWidth = `calc(62vh * ${width / height})`;
  });

  function move(split) {
    state.split = Math.min(100, Math.max(0, split));
    stage.style.setProperty("--split", state.split + "%");
    stage.setAttribute("aria-valuenow", Math.round(state.split));
  }
  function show() {
    const shot = shots[state.shot];
    const source = (name) => (state.errors && shot.errors[name]) || shot.pictures[name];
    part("over").src = source(state.left);
    part("under").src = source(state.right);
    const title = (name) => (state.errors && shot.errors[name] ? name + ": wrong in red" : name);
    viewer.querySelector(".tag.left").textContent = title(state.left);
    viewer.querySelector(".tag.right").textContent = title(state.right);
    part("over").alt = state.left;
    part("under").alt = state.right;
    part("pick-left").value = state.left;
    part("pick-right").value = state.right;
    part("pick-errors").checked = state.errors;
    part("caption").textContent = `${shot.caption} (${state.shot + 1} of ${shots.length})`;
    [...strip.children].forEach((button, number) => button.setAttribute("aria-current", number === state.shot));
    move(state.split);
  }
  function step(key, amount) {
    if (key === "shot") state.shot = (state.shot + amount + shots.length) % shots.length;
    else state[key] = names[(names.indexOf(state[key]) + amount + names.length) % names.length];
    show();
  }

  const at = (event) => {
    const box = stage.getBoundingClientRect();
    move((100 * (event.clientX - box.left)) / box.width);
  };
  stage.addEventListener("pointerdown", (event) => { stage.setPointerCapture(event.pointerId); at(event); });
  stage.addEventListener("pointermove", (event) => { if (event.buttons & 1) at(event); });
  const keys = {
    ArrowLeft: () => move(state.split - 2), ArrowRight: () => move(state.split + 2),
    Home: () => move(0), End: () => move(100),
    ArrowUp: () => step("shot", -1), ArrowDown: () => step("shot", 1),
    PageUp: () => step("shot", -1), PageDown: () => step("shot", 1),
    "[": () => step("right", -1), "]": () => step("right", 1),
    e: () => { state.errors = !state.errors; show(); },
  };
  stage.addEventListener("keydown", (event) => {
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (!(key in keys) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    keys[key]();
  });
  show();
});
