// The canvas: strokes, a keypose behind them, and boxes over them. The value that the server gets and sends:
// {strokes: PNG data URL or "", keypose: the same, regions: [{box: [left, top, right, bottom] in 0…1, prompt, concept}]}.
// What comes from the server goes into the page as text and properties only, never as HTML.
const COLOURS = ["#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#dc2626"];
const LONG = 512;
const MOST = 16;
const SMALLEST = 0.02;
const find = (selector) => element.querySelector(selector);
const board = find(".board"), stage = find(".stage"), ink = find(".ink"), pose = find(".pose"), layer = find(".boxes");
const list = find(".regions"), hint = find(".hint"), unpose = find(".unpose"), backdrop = find(".backdrop"), unback = find(".unback"), width = find(".width input");
const pen = ink.getContext("2d", { willReadFrequently: true });
let state = clean(props.value), selected = -1, mode = "pen", past = [];

function clean(value) {
  const given = value && typeof value === "object" ? value : {};
  const regions = Array.isArray(given.regions) ? given.regions : [];
  return {
    strokes: given.strokes || "",
    keypose: given.keypose || "",
    regions: regions.map((one) => ({ box: one.box.map(Number), prompt: one.prompt || "", concept: one.concept || "" })),
  };
}
const copy = () => JSON.parse(JSON.stringify(state));
function remember() {
  past.push(copy());
  if (past.length > 30) past.shift();
}
function emit() {
  props.value = copy();
}

// --- strokes
function fit() {
  const ratio = Number(props.ratio) || 1;
  const size = ratio >= 1 ? [LONG, Math.round(LONG / ratio)] : [Math.round(LONG * ratio), LONG];
  stage.style.aspectRatio = String(ratio);
  stage.style.maxWidth = "calc(min(62vh, 560px) * " + Math.max(ratio, 0.4) + ")";
  if (ink.width !== size[0] || ink.height !== size[1]) [ink.width, ink.height] = size;
}
let shown = 0;
function showStrokes() {
  fit();
  const turn = ++shown;
  pen.globalCompositeOperation = "source-over";
  pen.clearRect(0, 0, ink.width, ink.height);
  if (!state.strokes) return;
  const picture = new Image();
  picture.onload = () => {
    if (turn !== shown) return; // something newer is shown already
    pen.drawImage(picture, 0, 0, ink.width, ink.height);
    asInk();
  };
  picture.src = state.strokes;
}
function asInk() { // a sheet of paper with a drawing becomes ink on nothing; its file stays as it is
  const data = pen.getImageData(0, 0, ink.width, ink.height), p = data.data;
  for (let i = 3; i < p.length; i += 4) if (p[i] < 250) return;
  const dark = p[0] + p[1] + p[2] < 384;
  for (let i = 0; i < p.length; i += 4) {
    const light = (p[i] + p[i + 1] + p[i + 2]) / 3;
    p[i] = p[i + 1] = p[i + 2] = 0;
    p[i + 3] = dark ? light : 255 - light;
  }
  pen.putImageData(data, 0, 0);
}
function exported() {
  const p = pen.getImageData(0, 0, ink.width, ink.height).data;
  for (let i = 3; i < p.length; i += 4) if (p[i] > 16) return ink.toDataURL("image/png");
  return "";
}
const clamp = (x) => Math.min(1, Math.max(0, x));
function at(event) {
  const frame = stage.getBoundingClientRect();
  const left = frame.left + stage.clientLeft, top = frame.top + stage.clientTop;
  return [clamp((event.clientX - left) / stage.clientWidth), clamp((event.clientY - top) / stage.clientHeight)];
}
let stroke = null;
function line(from, to) {
  pen.globalCompositeOperation = mode === "eraser" ? "destination-out" : "source-over";
  pen.strokeStyle = "#000";
  pen.lineCap = pen.lineJoin = "round";
  pen.lineWidth = Number(width.value) * (mode === "eraser" ? 2 : 1);
  pen.beginPath();
  pen.moveTo(from[0] * ink.width, from[1] * ink.height);
  pen.lineTo(to[0] * ink.width, to[1] * ink.height + 0.01);
  pen.stroke();
}
ink.addEventListener("pointerdown", (event) => {
  if (event.button || mode === "box") return;
  remember();
  shown++; // a picture that is still loading must not fall over the stroke
  ink.setPointerCapture(event.pointerId);
  stroke = { id: event.pointerId, last: at(event) };
  hint.hidden = true;
  line(stroke.last, stroke.last);
});
ink.addEventListener("pointermove", (event) => {
  if (!stroke || event.pointerId !== stroke.id) return;
  for (const one of event.getCoalescedEvents ? event.getCoalescedEvents() : [event]) {
    const now = at(one);
    line(stroke.last, now);
    stroke.last = now;
  }
});
for (const name of ["pointerup", "pointercancel"]) {
  ink.addEventListener(name, (event) => {
    if (!stroke || event.pointerId !== stroke.id) return;
    stroke = null;
    state.strokes = exported();
    emit();
    hints();
  });
}

// --- boxes
const round = (x) => Math.round(x * 100) / 100;
function moved(box, dx, dy) {
  dx = Math.min(1 - box[2], Math.max(-box[0], dx));
  dy = Math.min(1 - box[3], Math.max(-box[1], dy));
  return [round(box[0] + dx), round(box[1] + dy), round(box[2] + dx), round(box[3] + dy)];
}
function resized(box, side, to) {
  const next = [...box], value = round(clamp(to));
  next[side] = side < 2 ? Math.min(value, round(box[side + 2] - SMALLEST)) : Math.max(value, round(box[side - 2] + SMALLEST));
  return next;
}
let drag = null;
layer.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  const item = event.target.closest(".box"), grip = event.target.closest(".grip"), start = at(event);
  if (item && mode !== "box") setMode("box");
  event.preventDefault();
  remember();
  if (item) {
    const index = Number(item.dataset.index);
    drag = { index, start, before: state.regions[index].box, grip: grip && grip.dataset.grip };
    select(index, true);
  } else {
    drag = { index: -1, start };
  }
  drag.id = event.pointerId;
  layer.setPointerCapture(event.pointerId);
});
layer.addEventListener("pointermove", (event) => {
  if (!drag || event.pointerId !== drag.id) return;
  const now = at(event), dx = now[0] - drag.start[0], dy = now[1] - drag.start[1];
  if (drag.index < 0) {
    if (Math.abs(dx) < SMALLEST || Math.abs(dy) < SMALLEST || state.regions.length >= MOST) return;
    state.regions.push({ box: [0, 0, 1, 1], prompt: "", concept: "" });
    drag.index = state.regions.length - 1;
    drag.fresh = true;
    selected = drag.index;
    rows();
  }
  const region = state.regions[drag.index];
  if (drag.fresh) {
    const [x, y] = drag.start;
    region.box = [Math.min(x, now[0]), Math.min(y, now[1]), Math.max(x, now[0]), Math.max(y, now[1])].map(round);
    region.box = resized(resized(region.box, 2, region.box[2]), 3, region.box[3]);
  } else if (drag.grip) {
    region.box = resized(region.box, drag.grip[0] === "l" ? 0 : 2, now[0]);
    region.box = resized(region.box, drag.grip[1] === "t" ? 1 : 3, now[1]);
  } else {
    region.box = moved(drag.before, dx, dy);
  }
  places();
});
for (const name of ["pointerup", "pointercancel"]) {
  layer.addEventListener(name, (event) => {
    if (!drag || event.pointerId !== drag.id) return;
    const { index, fresh, before } = drag;
    drag = null;
    if (index < 0 || (!fresh && before.join() === state.regions[index].box.join())) {
      past.pop(); // a click changes nothing
      if (index < 0) select(-1);
      return;
    }
    changed();
    if (fresh) wordsOf(index).focus({ preventScroll: true });
  });
}
layer.addEventListener("keydown", (event) => {
  const item = event.target.closest(".box");
  if (!item) return;
  const index = Number(item.dataset.index), region = state.regions[index];
  const step = event.altKey ? 0.05 : 0.01;
  const way = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
  if (way) {
    remember();
    region.box = event.shiftKey
      ? resized(resized(region.box, 2, region.box[2] + way[0]), 3, region.box[3] + way[1])
      : moved(region.box, ...way);
    places();
    emit();
  } else if (event.key === "Delete" || event.key === "Backspace") {
    remove(index);
  } else if (event.key === "Enter") {
    wordsOf(index).focus();
  } else {
    return;
  }
  event.preventDefault();
});
function add() {
  if (state.regions.length >= MOST) return;
  remember();
  const halves = [[0, 0, 0.5, 1], [0.5, 0, 1, 1]], shift = round(0.04 * (state.regions.length % 6));
  const free = halves.find((half) => !state.regions.some((one) => one.box[0] < half[2] && half[0] < one.box[2]));
  state.regions.push({ box: free || moved([0.1, 0.2, 0.5, 0.8], shift, shift), prompt: "", concept: "" });
  selected = state.regions.length - 1;
  changed();
  setMode("box");
  wordsOf(selected).focus();
}
function remove(index) {
  remember();
  state.regions.splice(index, 1);
  selected = -1;
  changed();
  (layer.querySelector(".box") || find('[data-do="add"]')).focus({ preventScroll: true });
}
function select(index, focus) {
  selected = index;
  places();
  for (const row of list.children) row.setAttribute("aria-current", String(Number(row.dataset.index) === index));
  if (focus && index >= 0) layer.children[index].focus({ preventScroll: true });
}

// --- what is seen of them
const known = () => (Array.isArray(props.concepts) ? props.concepts : []); // [name, token, noun]
const colour = (index) => COLOURS[index % COLOURS.length];
function make(kind, attributes, text) {
  const node = document.createElement(kind);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}
function places() {
  while (layer.children.length > state.regions.length) layer.lastChild.remove();
  state.regions.forEach((region, index) => {
    let item = layer.children[index];
    if (!item) {
      item = make("div", { class: "box", tabindex: "0", role: "group", "data-index": index });
      item.append(make("span", { class: "tag" }));
      for (const grip of ["lt", "rt", "lb", "rb"]) item.append(make("span", { class: "grip", "data-grip": grip }));
      item.addEventListener("focus", () => selected !== index && select(index));
      layer.append(item);
    }
    const [left, top, right, bottom] = region.box, per = (x) => Math.round(x * 1000) / 10;
    Object.assign(item.style, {
      left: per(left) + "%", top: per(top) + "%", width: per(right - left) + "%", height: per(bottom - top) + "%",
    });
    item.style.setProperty("--mine", colour(index));
    item.setAttribute("aria-current", String(index === selected));
    item.setAttribute("aria-label", "Region " + (index + 1) + ", from " + per(left) + " and " + per(top) + " to " + per(right) +
      " and " + per(bottom) + " percent. Arrow keys move it, with Shift they resize it, Delete takes it away.");
    item.firstChild.textContent = index + 1 + (region.concept ? " " + region.concept : "");
    const row = list.children[index];
    if (row) {
      row.querySelectorAll(".sides input").forEach((field, side) => {
        if (document.activeElement !== field) field.value = per(region.box[side]);
      });
    }
  });
  hints();
}
function hints() {
  hint.hidden = Boolean(stroke || state.strokes || state.keypose || state.regions.length || !backdrop.hidden);
}
const wordsOf = (index) => list.children[index].querySelector(".words");
function rows() {
  list.replaceChildren(...state.regions.map(rowOf));
}
function rename(before, now, index) { // in the prompt of the whole picture: where it names this box's concept
  const field = document.querySelector("#generate-prompt textarea"), parts = field ? field.value.split(before) : [];
  const earlier = state.regions.slice(0, index).filter((one) => one.prompt.includes(before)).length;
  if (earlier > parts.length - 2) return;
  const text = parts.slice(0, earlier + 1).join(before) + now + parts.slice(earlier + 1).join(before);
  Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, "value").set.call(field, text);
  field.dispatchEvent(new Event("input", { bubbles: true }));
}
function rowOf(region, index) {
  const row = make("li", { "data-index": index, "aria-current": String(index === selected) }), name = "region " + (index + 1);
  row.style.setProperty("--mine", colour(index));
  const concept = make("select", { "aria-label": "Concept of " + name });
  concept.append(make("option", { value: "" }, "no concept"));
  const names = known().map((one) => one[0]);
  if (region.concept && !names.includes(region.concept)) names.push(region.concept);
  for (const one of names) concept.append(make("option", { value: one }, one));
  concept.value = region.concept;
  const words = make("input", { class: "words", "aria-label": "Prompt of " + name, placeholder: "what is here and where, such as a red dog on the grass", maxlength: 2000 });
  words.value = region.prompt;
  concept.addEventListener("change", () => {
    remember();
    const named = (name) => known().find((one) => one[0] === name && one[1]); // those with a token
    const before = named(region.concept), now = named(concept.value);
    const usual = (one) => (one ? "a photo of " + one[1] : "");
    if (!region.prompt.trim() || region.prompt === usual(before)) region.prompt = words.value = usual(now);
    else if (before && now) region.prompt = words.value = region.prompt.split(before[1]).join(now[1]);
    region.concept = concept.value;
    if (before && now) rename(before[1], now[1], index);
    places();
    emit();
  });
  words.addEventListener("input", () => {
    region.prompt = words.value;
    emit();
  });
  const away = make("button", { type: "button", class: "away", "aria-label": "Delete " + name, title: "Delete" }, "✕");
  away.addEventListener("click", () => remove(index));
  const sides = make("div", { class: "sides" });
  ["left", "top", "right", "bottom"].forEach((side, at) => {
    const label = make("label", {}, side), field = make("input", { type: "number", min: 0, max: 100, step: 1 });
    field.setAttribute("aria-label", side + " of " + name + " in percent");
    field.addEventListener("change", () => {
      const value = Number(field.value);
      if (field.value !== "" && Number.isFinite(value)) {
        remember();
        region.box = resized(region.box, at, value / 100);
        emit();
      }
      field.value = Math.round(region.box[at] * 1000) / 10;
      places();
    });
    label.append(field);
    sides.append(label);
  });
  sides.append(make("span", {}, "% of the picture"));
  row.addEventListener("focusin", () => selected !== index && select(index));
  row.append(make("b", {}, String(index + 1)), concept, words, away, sides);
  return row;
}
function changed() {
  rows();
  places();
  emit();
}

// --- tools
function setMode(next) {
  mode = stage.dataset.mode = next;
  for (const button of element.querySelectorAll("[data-mode][aria-pressed]")) {
    button.setAttribute("aria-pressed", String(button.dataset.mode === next));
  }
}
function undo() {
  if (!past.length) return;
  state = past.pop();
  selected = -1;
  show();
  emit();
}
function clear() {
  remember();
  showBackdrop((props.backdrop = "")); // so that the same picture can come again
  state = { strokes: "", keypose: "", regions: [] };
  selected = -1;
  show();
  emit();
}
for (const button of element.querySelectorAll("[data-mode][aria-pressed]")) {
  button.addEventListener("click", () => setMode(button.dataset.mode));
}
find('[data-do="add"]').addEventListener("click", add);
find('[data-do="undo"]').addEventListener("click", undo);
find('[data-do="clear"]').addEventListener("click", clear);
unback.addEventListener("click", () => showBackdrop((props.backdrop = "")));
unpose.addEventListener("click", () => {
  remember();
  state.keypose = "";
  showPose();
  emit();
});
board.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input:not([type=range])");
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z" && !typing) {
    event.preventDefault();
    undo();
  }
});

// --- all of it
function showPose() {
  pose.hidden = unpose.hidden = !state.keypose;
  if (state.keypose) pose.src = state.keypose;
  hints();
}
function showBackdrop(picture) { // a picture behind everything, to drag boxes over; it is no part of the value
  backdrop.hidden = unback.hidden = !picture;
  if (picture) backdrop.src = picture;
  hints();
}
function show() {
  showStrokes();
  showPose();
  rows();
  places();
}
watch("value", () => {
  const next = clean(props.value);
  if (JSON.stringify(next) === JSON.stringify(state)) return;
  remember();
  state = next;
  selected = -1;
  show();
});
watch("ratio", showStrokes);
watch("backdrop", () => showBackdrop(props.backdrop));
watch("concepts", () => {
  rows();
  places();
});
show();
