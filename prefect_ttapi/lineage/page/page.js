"use strict";
// Everything shown is set as text or as an attribute, never as HTML: prompts are anybody's words.
const byId = (id) => document.getElementById(id);
const { rows, pages } = JSON.parse(byId("data").textContent);

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// ---- theme: the system's, until somebody chooses
const THEME = "prefect-ttapi-gallery-theme";
const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");
try { root.style.colorScheme = localStorage.getItem(THEME) ?? ""; } catch { /* no storage for this page */ }
byId("theme").addEventListener("click", () => {
  const now = root.style.colorScheme || (dark.matches ? "dark" : "light");
  root.style.colorScheme = now === "dark" ? "light" : "dark";
  try { localStorage.setItem(THEME, root.style.colorScheme); } catch { /* as above */ }
});

// what the file says of where it comes from: a short word and a long one
const MARKS = { credentials: ["CR", "Content Credentials"], xmp: ["XMP", "XMP: made by a model"], prompt: ["P", "XMP: the prompt"] };

// ---- cards: one for each image, and one for each row without images
const cards = rows.flatMap((row) => (row.images.length ? row.images : [null]).map((image) => ({ row, image })));
for (const card of cards) {
  const { row, image } = card;
  card.id = `${row.row}.${image ? image.index : 0}`;
  card.status = row.status;
  card.tokens = row.tokens ?? -1;
  card.words = [
    row.prompt, row.model, row.hash, row.error, row.error_type, ...Object.values(row.values),
    image?.sha256, image?.revised, ...(image?.copies ?? []).map((copy) => copy.uri),
  ].filter(Boolean).join("\n").toLowerCase();
  card.button = face(card);
  card.item = make("li", {}, card.button, ...choice(card));
}

function face(card) {
  const { row, image } = card;
  const facts = [row.model, image && `${image.width}\u00d7${image.height}`].filter(Boolean).join(" \u00b7 ");
  const button = make("button", { class: "card", type: "button" },
    make("div", { class: "frame" }, image ? small(row, image) : why(row)),
    make("div", { class: "caption" },
      row.values.name ? make("div", { class: "name", dir: "auto" }, row.values.name) : null,
      make("div", { class: "prompt", dir: "auto" }, row.prompt || "no prompt"),
      make("div", { class: "meta" },
        make("i", { class: `dot ${row.status}`, title: row.status }), make("span", {}, facts || row.status),
        ...badges(image?.marks))));
  button.addEventListener("click", () => open(card));
  return button;
}

function badges(marks) {
  return (marks ?? []).map((mark) => make("abbr", { class: "mark", title: MARKS[mark][1] }, MARKS[mark][0]));
}

function isMarked(card, mark) {
  const marks = card.image?.marks;
  return mark === "none" ? marks?.length === 0 : Boolean(marks?.includes(mark));
}

function small(row, image) {
  if (!image.thumbnail) return make("span", { class: "none" }, "no preview");
  const source = `data:image/webp;base64,${image.thumbnail}`;
  const shape = image.width < image.height ? "tall" : "wide";
  return make("img", { class: shape, src: source, alt: row.prompt.slice(0, 200), decoding: "async", loading: "lazy" });
}

function why(row) {
  return make("div", { class: `why ${row.status}` }, make("b", {}, row.error_type || row.status), row.error || "");
}

// ---- download of what is chosen
const chosen = new Set();

function choice(card) {
  const file = downloadable(card);
  if (!file) return [];
  const box = make("input", { class: "choose", type: "checkbox", "aria-label": `Choose ${file.name}` });
  box.addEventListener("change", () => { chosen[box.checked ? "add" : "delete"](card); tellChosen(); });
  card.box = box;
  return [box];
}

// the copy under the name that people know, else the image; only from beside this page
function downloadable({ row, image }) {
  if (!image) return null;
  const copy = image.copies.find((one) => one.href?.startsWith("."));
  const href = copy?.href ?? (image.beside ? image.href : null);
  if (!href) return null;
  const ending = image.type.split("/").pop().replace("jpeg", "jpg");
  const own = `${row.values.name || row.hash.slice(0, 12)}-${image.index}.${ending}`;
  return { href, name: copy ? decodeURIComponent(copy.href.split("/").pop()) : own };
}

function tellChosen() {
  byId("chosen").hidden = !chosen.size;
  byId("chosen-count").textContent = `${chosen.size.toLocaleString("en")} chosen`;
}

// browsers download from a web server; from a disk, where the files are already, they save the list of them
const onDisk = location.protocol === "file:";
byId("download").textContent = onDisk ? "Save list of files" : "Download";
byId("download").addEventListener("click", async () => {
  const files = [...chosen].map(downloadable);
  if (onDisk) {
    const paths = files.map(({ href }) => decodeURIComponent(new URL(href, location.href).pathname));
    const url = URL.createObjectURL(new Blob([paths.join("\n"), "\n"], { type: "text/plain" }));
    make("a", { href: url, download: "images.txt" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
    return;
  }
  for (const { href, name } of files) {
    make("a", { href, download: name }).click();
    await new Promise((later) => setTimeout(later, 250));  // browsers drop what comes too fast
  }
});
byId("unchoose").addEventListener("click", () => {
  for (const card of chosen) card.box.checked = false;
  chosen.clear();
  tellChosen();
});

// ---- filter and sort
const grid = byId("grid");
const pressed = new Set();
let shown = cards;

const order = {
  row: () => 0,
  prompt: (a, b) => a.row.prompt.localeCompare(b.row.prompt),
  model: (a, b) => a.row.model.localeCompare(b.row.model),
  tokens: (a, b) => b.tokens - a.tokens,
  variants: (a, b) => firsts.get(a.row.prompt) - firsts.get(b.row.prompt),
};

// where each prompt comes first, and of how many cards
const firsts = new Map();
const variants = new Map();
cards.forEach(({ row: { prompt } }, at) => {
  if (!firsts.has(prompt)) firsts.set(prompt, at);
  variants.set(prompt, (variants.get(prompt) ?? 0) + 1);
});

// one line of the grid for each prompt that was asked for more than once
function lines() {
  let before = null;
  return shown.flatMap(({ row: { prompt }, item }) => {
    if (prompt === before) return [item];
    before = prompt;
    return [make("li", { class: "line", dir: "auto" }, prompt || "no prompt"), item];
  });
}

function refresh() {
  const words = byId("text").value.toLowerCase().split(/\s+/).filter(Boolean);
  const model = byId("model").value;
  const mark = byId("mark").value;
  shown = cards.filter((card) =>
    (!pressed.size || pressed.has(card.status)) && (!model || card.row.model === model) &&
    (!mark || isMarked(card, mark)) &&
    words.every((word) => card.words.includes(word)));
  const side = byId("sort").value === "variants";
  if (side) shown = shown.filter((card) => variants.get(card.row.prompt) > 1);
  shown.sort(order[byId("sort").value]);
  grid.replaceChildren(...(side ? lines() : shown.map((card) => card.item)));
  askOthers(words, model, mark);
  const all = `${cards.length.toLocaleString("en")}${pages > 1 ? " on this page" : ""}`;
  byId("count").value = shown.length === cards.length ? all : `${shown.length.toLocaleString("en")} of ${all}`;
  byId("empty").hidden = shown.length > 0;
}

// ---- the other pages, through the frame that knows them all
const here = location.pathname.split("/").pop() || "index.html";
let others = null;
let question = 0;
let asked = null;

function askOthers(words, model, mark) {
  question += 1;
  const wanted = words.length || model || mark || pressed.size;
  asked = pages > 1 && wanted ? { question, words, model, mark, statuses: [...pressed], page: here } : null;
  if (!asked) { byId("elsewhere").hidden = true; return; }
  if (others) others.contentWindow.postMessage(asked, "*");
  else fetchOthers();
}

function fetchOthers() {
  others = make("iframe", { src: "./search.html", hidden: true, sandbox: "allow-scripts", title: "Search" });
  document.body.append(others);
}

addEventListener("message", ({ data, source }) => {
  if (!others || source !== others.contentWindow) return;
  if (data.models) {
    const known = new Set([...byId("model").options].map((option) => option.value));
    for (const name of data.models) if (!known.has(name)) byId("model").append(make("option", { value: name }, name));
    if (asked) source.postMessage(asked, "*");
    return;
  }
  if (!asked || data.question !== asked.question) return;
  asked = null; // one answer is enough: a frame that was loading may have been asked twice
  const [title, list] = byId("elsewhere").children;
  const told = data.count === 1 ? "1 more on another page" : `${data.count.toLocaleString("en")} more on other pages`;
  title.textContent = data.count > data.found.length ? `${told}, the first ${data.found.length}` : told;
  list.replaceChildren(...data.found.map(([page, card, status, name, prompt, model]) =>
    make("li", {}, make("a", { href: `./${page}#${card}` },
      make("i", { class: `dot ${status}`, title: status }),
      make("b", { dir: "auto" }, name || ""), make("span", { dir: "auto" }, prompt || "no prompt"), make("small", {}, model)))));
  byId("elsewhere").hidden = !data.count;
  if (data.count) byId("count").value += `, ${told}`;
  if (data.count && !shown.length) byId("empty").hidden = true;
});

function nothing() {
  if (!cards.length) return ["Nothing was asked for in this batch, so there is nothing to see."];
  const all = make("button", { type: "button" }, "Show everything");
  all.addEventListener("click", clear);
  return ["Nothing matches. ", all];
}

function clear() {
  byId("text").value = "";
  byId("model").value = byId("mark").value = "";
  if (byId("sort").value === "variants") byId("sort").value = "row";
  pressed.clear();
  for (const chip of byId("statuses").children) chip.setAttribute("aria-pressed", "false");
  refresh();
}

for (const status of ["generated", "cached", "failed", "skipped"]) {
  const count = cards.filter((card) => card.status === status).length;
  if (!count) continue;
  const chip = make("button", { class: "chip", type: "button", "aria-pressed": "false", "data-status": status },
    make("i", { class: `dot ${status}` }), status, make("b", {}, count.toLocaleString("en")));
  chip.addEventListener("click", () => {
    const on = !pressed.delete(status);
    if (on) pressed.add(status);
    chip.setAttribute("aria-pressed", String(on));
    refresh();
  });
  byId("statuses").append(chip);
}

const models = [...new Set(cards.map((card) => card.row.model))].filter(Boolean).sort();
byId("model").append(make("option", { value: "" }, "all"), ...models.map((name) => make("option", { value: name }, name)));
byId("marked").hidden = !cards.some((card) => card.image?.marks?.length) && pages === 1;
for (const id of ["text", "model", "mark", "sort"]) byId(id).addEventListener("input", refresh);
byId("empty").append(...nothing());
byId("text").addEventListener("focus", () => { if (pages > 1 && !others) fetchOthers(); });
if (![...variants.values()].some((count) => count > 1)) byId("sort").querySelector("[value=variants]").remove();
byId("bar").hidden = !cards.length;
refresh();

// ---- detail
const dialog = byId("detail");
let current = null;

function open(card) {
  current = card;
  const at = shown.indexOf(card);
  byId("detail-place").textContent = `${at + 1} of ${shown.length}`;
  byId("previous").disabled = at <= 0;
  byId("next").disabled = at >= shown.length - 1;
  byId("stage").replaceChildren(large(card));
  byId("detail-facts").replaceChildren(...told(card));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = byId("detail-facts").scrollTop = 0;
  mark(`#${card.id}`);
}

function large({ row, image }) {
  if (!image) return why(row);
  const picture = small(row, image);
  if (image.beside) {
    // the image itself, from beside this page; its thumbnail where it is not there
    const thumbnail = picture.cloneNode(true);
    thumbnail.classList.add("small");
    const whole = make("img", { src: image.href, alt: row.prompt.slice(0, 200) });
    whole.addEventListener("error", () => whole.replaceWith(thumbnail), { once: true });
    return make("a", { href: image.href, target: "_blank", rel: "noopener" }, whole);
  }
  picture.classList.add("small");
  return image.href ? make("a", { href: image.href, target: "_blank", rel: "noopener" }, picture) : picture;
}

function told({ row, image }) {
  const parts = [heading("Prompt"), words(row.prompt || "no prompt", "detail-prompt")];
  if (image?.revised) parts.push(heading("Prompt as the model revised it"), words(image.revised));
  if (row.error && image) parts.push(heading(row.error_type || "Error"), words(row.error));
  if (row.notes.length) parts.push(heading("Perhaps paid without images"), words(row.notes.join("\n")));
  if (image) {
    parts.push(heading("Image"), table([
      ["File", link(image.href, image.uri)],
      ...image.copies.map((copy) => ["Delivered", link(copy.href, copy.uri)]),
      ["Marks", image.marks && (image.marks.map((mark) => MARKS[mark][1]).join(", ") || "none")],
      ["Content Credentials", image.signature],
      ["Size", `${image.width} \u00d7 ${image.height}, ${image.size}, ${image.type}`],
      ["SHA-256", code(image.sha256)],
    ]));
  }
  parts.push(heading("Request"), table([
    ["Row", String(row.row)],
    ["Status", row.status],
    ...Object.entries(row.asked),
    ["Request hash", row.hash && code(row.hash)],
    ...Object.entries(row.values),
  ]));
  parts.push(...section("Where it came from", Object.entries(row.origin)));
  return parts;
}

const heading = (text) => make("h2", {}, text);
const words = (text, id) => make("p", { class: text.length > 900 ? "words long" : "words", dir: "auto", id }, text);
const link = (href, text) => (href ? make("a", { href, target: "_blank", rel: "noopener" }, text) : text);
const section = (title, facts) => (facts.length ? [heading(title), table(facts)] : []);

function table(facts) {
  const lines = facts.filter(([, value]) => value).map(([name, value]) => {
    const cell = make("td", { dir: "auto" }, value);
    if (value.nodeType && value.tagName !== "A") cell.className = "code";
    return make("tr", {}, make("th", { scope: "row" }, name), cell);
  });
  return make("table", {}, make("tbody", {}, ...lines));
}

function code(text) {
  const copy = make("button", { class: "copy", type: "button" }, "copy");
  copy.addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(text); copy.textContent = "copied"; }
    catch { getSelection().selectAllChildren(copy.previousSibling); }
  });
  return make("span", {}, make("span", {}, text), copy);
}

function mark(place) {
  try { history.replaceState(null, "", place || location.pathname + location.search); } catch { /* not here */ }
}

function step(by) {
  const card = shown[shown.indexOf(current) + by];
  if (card) open(card);
}

byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
byId("close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
dialog.addEventListener("close", () => { mark(""); byId("stage").replaceChildren(); current?.button.focus(); });

// ---- keyboard
function columns() {
  const top = shown[0]?.item.offsetTop;
  const second = shown.findIndex((card) => card.item.offsetTop !== top);
  return second < 0 ? shown.length : second;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (dialog.open) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) { event.preventDefault(); step(by); }
    return;
  }
  if (event.key === "/" && !typing) { event.preventDefault(); byId("text").focus(); return; }
  if (event.key === "Escape" && event.target.id === "text") { event.target.value = ""; refresh(); event.target.blur(); return; }
  if (typing && event.key !== "ArrowDown") return;
  if (typing && event.target.id !== "text") return;
  const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns() }[event.key];
  if (!by || !shown.length) return;
  const at = shown.findIndex((card) => card.button === document.activeElement);
  const to = shown[at < 0 ? 0 : at + by];
  if (to) { event.preventDefault(); to.button.focus(); }
});

const linked = cards.find((card) => `#${card.id}` === location.hash);
if (linked) open(linked);
