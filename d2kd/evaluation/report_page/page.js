"use strict";

// --- tables: the buttons in their headers sort them ---------------------------------------------------------------

for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.firstElementChild.addEventListener("click", () => sortTable(table, heads, column));
  });
}

function sortTable(table, heads, column) {
  const byName = heads[column].classList.contains("name");
  const before = heads[column].getAttribute("aria-sort");
  const opposite = { ascending: "descending", descending: "ascending", none: byName ? "ascending" : "descending" };
  heads.forEach((head, place) => head.setAttribute("aria-sort", place === column ? opposite[before] : "none"));
  const sign = opposite[before] === "ascending" ? 1 : -1;
  const key = (row) => (byName ? row.cells[column].textContent : row.cells[column].dataset.value);
  const compare = (a, b) => (byName ? a.localeCompare(b, undefined, { numeric: true }) : a - b);
  const rows = [...table.tBodies[0].rows].sort((one, other) => {
    const [a, b] = [key(one), key(other)];
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined); // what is not known is last
    return sign * compare(a, b);
  });
  table.tBodies[0].append(...rows);
}

// --- elements -----------------------------------------------------------------------------------------------------

function make(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function draw(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

// --- the image browser --------------------------------------------------------------------------------------------

const data = JSON.parse(document.getElementById("data").textContent);
const TRUTH = ""; // the source that is no model
const MARKS = { truth: "", plain: "", found: "✓ ", wrong: "✕ ", missed: "? " };
const MEANINGS = {
  detections: { found: "found", wrong: "wrong", missed: "missed", truth: "ground truth" },
  label_maps: { wrong: "wrong pixels", ignored: "pixels that do not count" },
  classes: { found: "right", wrong: "wrong" },
};
const pen = document.createElement("canvas").getContext("2d"); // measures labels
pen.font = "600 11px system-ui, sans-serif";

let sources, state, root;

if (data && data.images.length) openBrowser();

function openBrowser() {
  sources = data.models.map((name) => ({ name, title: data.titles[name], style: `m${data.numbers[name] % 6}` }));
  if (data.has_truth) sources.unshift({ name: TRUTH, title: "ground truth", style: "truth" });
  state = {
    images: data.images,
    index: 0,
    threshold: data.threshold,
    on: new Set(sources.map((source) => source.name)),
    large: new Set(),
    shown: { boxes: true, masks: true, points: false, labels: true },
    overlay: "map",
  };
  root = document.getElementById("browser");
  root.replaceChildren(
    make("div", { class: "controls" }, sourceSwitches(), ...controls()),
    make(
      "div",
      { class: "turn" },
      make("button", { type: "button", id: "previous", onclick: () => turn(-1), "aria-label": "previous image" }, "‹"),
      make("p", { id: "caption", "aria-live": "polite" }),
      make("button", { type: "button", id: "next", onclick: () => turn(1), "aria-label": "next image" }, "›"),
    ),
    make("div", { id: "panels", class: data.kind }),
    make("ul", { id: "key" }),
    make("div", { id: "strip" }),
    make("p", { class: "hint keys" }, `← and →: other images. 1 to ${sources.length}: on and off. A click on an image: its size.`),
    make("p", { class: "hint touch" }, "A swipe: other images. A touch on an image: its size."),
  );
  document.addEventListener("keydown", onKey);
  listenToSwipes(document.getElementById("panels"));
  new ResizeObserver(() => drawOverlays()).observe(document.getElementById("panels"));
  fillStrip();
  show(0);
}

function sourceSwitches() {
  const switches = sources.map((source) => {
    const input = make("input", { type: "checkbox", name: "source", value: source.name, checked: true });
    input.addEventListener("change", () => {
      state.on[input.checked ? "add" : "delete"](source.name);
      drawPanels();
    });
    return make("label", { class: `switch ${source.style}` }, input, source.title);
  });
  return make("fieldset", { class: "switches" }, make("legend", {}, "Show"), ...switches);
}

function controls() {
  const made = [];
  if (data.kind === "detections") {
    const range = { min: data.lowest, max: 1, step: 0.01, value: data.threshold };
    made.push(slider("threshold", "score from", range, (value) => value.toFixed(2), (value) => {
      state.threshold = value;
      drawOverlays();
    }));
    const all = data.images.flatMap((image) => [image.truth, ...Object.values(image.found)].flat());
    const has = { boxes: true, masks: all.some((o) => o.outline), points: all.some((o) => o.points), labels: true };
    const kinds = Object.keys(has).filter((kind) => has[kind]);
    made.push(make("div", { class: "switches" }, ...kinds.map((kind) => {
      const input = make("input", { type: "checkbox", name: kind, checked: state.shown[kind] });
      input.addEventListener("change", () => { state.shown[kind] = input.checked; drawOverlays(); });
      return make("label", { class: "switch" }, input, kind);
    })));
  }
  if (data.kind === "label_maps") {
    const range = { min: 0, max: 1, step: 0.05, value: 0.6 };
    const apply = (value) => root.style.setProperty("--opacity", value);
    made.push(slider("opacity", "opacity", range, (value) => `${Math.round(100 * value)} %`, apply));
    const kinds = data.has_truth ? { map: "classes", errors: "what is wrong" } : { map: "classes" };
    made.push(choice("overlay", "colors", kinds, (value) => { state.overlay = value; drawPanels(); }));
  }
  const orders = { difference: "largest difference", name: "file name" };
  if (data.pair && data.has_truth) {
    data.pair.forEach((name) => { orders[name] = `${data.titles[name]} ahead`; });
  }
  made.push(choice("order", "order", orders, reorder));
  return made;
}

function slider(id, title, range, words, onChange) {
  const output = make("output", { for: id }, words(range.value));
  const input = make("input", { type: "range", id, ...range });
  input.addEventListener("input", () => {
    output.value = words(Number(input.value));
    onChange(Number(input.value));
  });
  return make("label", { class: "slider" }, title, input, output);
}

function choice(id, title, options, onChange) {
  const entries = Object.entries(options).map(([value, text]) => make("option", { value }, text));
  const select = make("select", { id }, ...entries);
  select.addEventListener("change", () => onChange(select.value));
  return make("label", { class: "choice" }, title, select);
}

function reorder(by) {
  const sorted = [...data.images];
  if (by === "name") sorted.sort((one, other) => one.name.localeCompare(other.name, undefined, { numeric: true }));
  else if (by !== "difference") {
    const sign = by === data.pair[0] ? 1 : -1;
    sorted.sort((one, other) => sign * (lead(other) - lead(one)));
  }
  state.images = sorted;
  fillStrip();
  show(0);
}

// How much the first model of the compared pair has above the second one on an image.
function lead(image) {
  const [ours, theirs] = data.pair.map((name) => merit(image, image.found[name]));
  return ours - theirs;
}

function merit(image, found) {
  if (!found) return 0;
  if (data.kind === "detections") return found.filter((d) => d.score >= data.threshold && d.finds >= 0).length;
  if (data.kind === "label_maps") return found.right || 0;
  return found.scores[found.classes.indexOf(image.truth)] || 0;
}

function leadText(image) {
  const value = lead(image);
  const text = { detections: value.toFixed(0), label_maps: `${(100 * value).toFixed(0)} %`, classes: value.toFixed(2) };
  return `${value > 0 ? "+" : ""}${text[data.kind]}`.replace("-", "−");
}

function fillStrip() {
  const strip = document.getElementById("strip");
  strip.replaceChildren(...state.images.map((image, place) => {
    const badge = data.pair && data.has_truth ? [make("span", {}, leadText(image))] : [];
    const label = `image ${place + 1}: ${image.name}`;
    const picture = make("img", { src: image.source, alt: "" });
    return make("button", { type: "button", "aria-label": label, onclick: () => show(place) }, picture, ...badge);
  }));
}

function turn(step) {
  show((state.index + step + state.images.length) % state.images.length);
}

function show(index) {
  state.index = index;
  const image = state.images[index];
  const caption = document.getElementById("caption");
  caption.replaceChildren(make("strong", {}, `${index + 1} of ${state.images.length}`), ` ${image.name}`);
  const strip = document.getElementById("strip");
  [...strip.children].forEach((button, place) => button.setAttribute("aria-current", place === index));
  const thumb = strip.children[index]; // without moving the page, as scrollIntoView might
  strip.scrollLeft = thumb.offsetLeft - strip.offsetLeft - (strip.clientWidth - thumb.clientWidth) / 2;
  drawPanels();
}

function drawPanels() {
  const image = state.images[state.index];
  const shown = sources.filter((source) => state.on.has(source.name));
  const panels = document.getElementById("panels");
  const focused = [...panels.children].indexOf(document.activeElement.closest(".panel"));
  if (data.kind === "classes") {
    panels.replaceChildren(classPicture(image), ...shown.filter((s) => s.name !== TRUTH).map((s) => answers(image, s)));
  } else {
    panels.replaceChildren(...shown.map((source) => panel(image, source)));
  }
  if (focused >= 0 && focused < panels.children.length) {
    panels.children[focused].querySelector(".stage").focus({ preventScroll: true });
  }
  drawOverlays();
  drawKey(image);
}

function panel(image, source) {
  const figure = make("figure", { class: `panel ${source.style}` });
  figure.source = source;
  const stage = make("button", { type: "button", class: "stage", "aria-label": `${source.title}: larger or smaller` });
  stage.style.aspectRatio = `${image.width} / ${image.height}`;
  stage.style.setProperty("--ratio", image.width / image.height);
  stage.append(picture(image));
  const enlarge = () => {
    const large = figure.classList.toggle("large");
    state.large[large ? "add" : "delete"](source.name);
    drawOverlays();
  };
  stage.addEventListener("click", enlarge);
  figure.classList.toggle("large", state.large.has(source.name));
  figure.append(make("figcaption", {}, make("strong", {}, source.title), make("span")), stage);
  return figure;
}

function picture(image) {
  const sharp = Math.max(image.width, image.height) < 256 ? "sharp" : undefined;
  return make("img", { src: image.source, class: sharp, alt: image.name });
}

// Draws over the pictures that are there what the switches and sliders ask for.
function drawOverlays() {
  if (data.kind === "classes") return; // nothing is drawn over them
  const image = state.images[state.index];
  for (const figure of document.querySelectorAll("#panels .panel")) {
    const stage = figure.querySelector(".stage");
    stage.querySelectorAll(".overlay").forEach((old) => old.remove());
    const note = figure.querySelector("figcaption span");
    if (data.kind === "detections") {
      const objects = judge(image, figure.source.name);
      note.textContent = count(objects, figure.source.name);
      stage.append(detectionOverlay(image, objects, image.width / (stage.clientWidth || image.width)));
    } else if (data.kind === "label_maps") {
      const maps = figure.source.name === TRUTH ? image.truth : image.found[figure.source.name];
      note.textContent = !maps ? "no label map" : maps.right === undefined ? "" : `${(100 * maps.right).toFixed(1)} % right`;
      if (maps && maps[state.overlay]) stage.append(make("img", { class: "overlay", src: maps[state.overlay], alt: "" }));
    }
  }
}

// What a model finds from the score on that is chosen, best first, and then what it misses.
function judge(image, name) {
  if (name === TRUTH) return image.truth.map((object) => ({ ...object, state: "truth" }));
  const shown = (image.found[name] || []).filter((detection) => detection.score >= state.threshold);
  if (!data.has_truth) return shown.map((detection) => ({ ...detection, state: "plain" }));
  const found = new Set(shown.map((detection) => detection.finds));
  const missed = image.truth.filter((_, place) => !found.has(place));
  return [
    ...shown.map((detection) => ({ ...detection, state: detection.finds >= 0 ? "found" : "wrong" })),
    ...missed.map((object) => ({ ...object, state: "missed" })),
  ];
}

function count(objects, name) {
  const of = (wanted) => objects.filter((object) => object.state === wanted).length;
  if (name === TRUTH) return `${objects.length} object${objects.length === 1 ? "" : "s"}`;
  if (!data.has_truth) return `${objects.length} detection${objects.length === 1 ? "" : "s"}`;
  return `${of("found")} found, ${of("missed")} missed, ${of("wrong")} wrong`;
}

// `unit` is the length of a pixel of the screen in pixels of the image.
function detectionOverlay(image, objects, unit) {
  const overlay = draw("svg", { class: "overlay", viewBox: `0 0 ${image.width} ${image.height}` });
  for (const object of [...objects].reverse()) { // the best on top
    const [x, y, width, height] = object.box;
    const group = draw("g", { class: `object ${object.state}` }, draw("title", {}, describe(object)));
    if (state.shown.masks && object.outline) group.append(draw("path", { class: "mask", d: object.outline }));
    if (state.shown.boxes || !object.outline) {
      for (const line of ["casing", "line"]) group.append(draw("rect", { class: line, x, y, width, height }));
    }
    if (state.shown.points) {
      for (const [cx, cy] of object.points || []) group.append(draw("circle", { cx, cy, r: 3 * unit }));
    }
    overlay.append(group);
  }
  if (state.shown.labels) overlay.append(...labels(image, objects, unit));
  return overlay;
}

function nameOf(label) {
  return data.classes[label] === undefined ? `class ${label}` : data.classes[label];
}

function describe(object) {
  const score = object.score === undefined ? "" : `, score ${object.score.toFixed(2)}`;
  return `${nameOf(object.label)}${score}${MARKS[object.state] ? `, ${object.state}` : ""}`;
}

// Labels above, in or below their boxes, where they cover no other one, and a fifth of the image in all.
function labels(image, objects, unit) {
  const taken = [];
  const made = [];
  let room = (image.width * image.height) / 5;
  for (const object of objects) {
    const score = object.score === undefined ? "" : ` ${object.score.toFixed(2)}`;
    const text = `${MARKS[object.state]}${nameOf(object.label)}${score}`;
    const [width, height] = [(pen.measureText(text).width + 9) * unit, 16 * unit];
    const [x, y, , tall] = object.box;
    if (width > image.width || width * height > room) continue;
    const left = Math.max(0, Math.min(x, image.width - width));
    const top = [y - height, y, y + tall].find((t) => t >= 0 && t + height <= image.height && !taken.some(
      (o) => left < o.left + o.width && o.left < left + width && t < o.top + height && o.top < t + height,
    ));
    if (top === undefined) continue;
    taken.push({ left, top, width });
    room -= width * height;
    const place = { x: left + 4.5 * unit, y: top + 12 * unit, "font-size": 11 * unit };
    made.push(draw("g", { class: `label ${object.state}` },
      draw("rect", { x: left, y: top, width, height, rx: 2 * unit }), draw("text", place, text)));
  }
  return made;
}

function classPicture(image) {
  const truth = data.has_truth && state.on.has(TRUTH) ? [make("strong", {}, `true: ${nameOf(image.truth)}`)] : [];
  return make("figure", { class: "picture" }, picture(image), make("figcaption", {}, ...truth));
}

function answers(image, source) {
  const said = image.found[source.name];
  const right = said && said.classes[0] === image.truth;
  const verdict = !said ? "no prediction" : !data.has_truth ? "" : right ? "✓ right" : "✕ wrong";
  const rows = (said ? said.classes : []).map((label, place) => {
    const score = said.scores[place];
    const bar = make("i"); // without a number, nothing
    bar.style.setProperty("--part", Math.max(0, Math.min(1, score)));
    const mine = data.has_truth && label === image.truth ? "found" : place === 0 ? "wrong" : "other";
    return make("li", { class: mine }, make("span", {}, nameOf(label)), bar, make("b", {}, score === null ? "–" : score.toFixed(2)));
  });
  const title = make("figcaption", {}, make("strong", {}, source.title), make("span", {}, verdict));
  return make("figure", { class: `panel ${source.style}` }, title, make("ol", { class: "answers" }, ...rows));
}

function drawKey(image) {
  const entries = Object.entries(data.has_truth ? MEANINGS[data.kind] : {}).map(([kind, text]) => {
    const box = (line) => draw("rect", { class: line, x: 3, y: 3, width: 22, height: 12 });
    return make("li", { class: `object ${kind}` }, draw("svg", { viewBox: "0 0 28 18" }, box("casing"), box("line")), text);
  });
  const classes = (image.present || []).map((label) => {
    const chip = make("i");
    chip.style.background = data.colors[label] || "transparent";
    return make("li", {}, chip, nameOf(label));
  });
  const shown = data.kind === "label_maps" && state.overlay === "map" ? classes : entries;
  document.getElementById("key").replaceChildren(...shown);
}

// --- keys and swipes ----------------------------------------------------------------------------------------------

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input[type=range], select, .scroll")) return;
  if (event.key === "ArrowLeft") turn(-1);
  else if (event.key === "ArrowRight") turn(1);
  else if (/^[1-9]$/.test(event.key)) {
    const input = root.querySelectorAll("input[name=source]")[event.key - 1];
    if (input) input.click();
  } else return;
  event.preventDefault();
}

function listenToSwipes(element) {
  let start = null;
  element.addEventListener("touchstart", (event) => {
    start = event.touches.length === 1 ? event.touches[0] : null;
  }, { passive: true });
  element.addEventListener("touchend", (event) => {
    if (!start) return;
    const [across, down] = ["clientX", "clientY"].map((side) => event.changedTouches[0][side] - start[side]);
    start = null;
    if (Math.abs(across) > 45 && Math.abs(across) > 1.5 * Math.abs(down)) turn(across < 0 ? 1 : -1);
  }, { passive: true });
}
