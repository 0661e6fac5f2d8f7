/** The page: what is asked and what is shown. The work is done by worker.js. */

const $ = (id) => document.getElementById(id);
const SMALL = 1e8; // bytes that are loaded without asking
const [LEAST, MOST] = [1400, 4e6]; // longer side, and pixels, of the masks that are shown; saved ones are as large as the picture

const state = { ready: false, bitmap: null, size: null, marks: [], found: [], only: null, file: null, encoded: false, took: "" };
const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
const waiting = new Map();
let number = 0;

worker.onmessage = ({ data: { id, result, error, progress, how } }) => {
  if (progress) return show(progress);
  if (how) return tellHow(how);
  const { done, failed } = waiting.get(id);
  waiting.delete(id);
  if (error === undefined) done(result);
  else failed(new Error(error));
};
worker.onerror = (event) => {
  event.preventDefault();
  complain("The part of the page that computes has stopped, perhaps for want of memory. Load the page again.");
};

function work(action, given = {}) {
  return new Promise((done, failed) => {
    waiting.set(++number, { done, failed });
    worker.postMessage({ id: number, action, ...given });
  });
}

/* One thing at a time, and of what was asked meanwhile the newest alone. */
let busy = false;
let next = null;

async function perform(task, rank = 0) {
  if (busy) return void (next = next && next.rank > rank ? next : { task, rank }); // a picture is asked once it is there
  busy = true;
  complain(null);
  show({ words: "Working" });
  try {
    await task();
  } catch (error) {
    complain(error.message);
  }
  busy = false;
  show(null);
  const queued = next;
  next = null;
  if (queued) await perform(queued.task);
}

function show(progress) {
  const { words, done, total } = progress ?? {};
  const share = total ? ` ${megabytes(done)} of ${megabytes(total)}` : "";
  const what = mode() === "find" ? "Type words, or draw a box." : "Click on an object, or draw a box around it.";
  const rest = state.encoded ? (asked() ? state.took : what) : state.ready ? "Ready for a picture." : "";
  $("words").textContent = progress ? `${words}${share} …` : rest;
  $("progress").hidden = !progress;
  if (total) $("progress").value = done / total;
  else $("progress").removeAttribute("value");
  $("go").disabled = !state.ready || !state.file || !asked();
}

function complain(words) {
  $("error").textContent = words ?? "";
  $("error").hidden = !words;
}

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;
const seconds = (begun) => `${((performance.now() - begun) / 1000).toFixed(1)} s`;
const mode = () => document.querySelector("[name=mode]:checked").value;
const tool = () => document.querySelector("[name=tool]:checked").value;

/* Loading */

perform(async () => {
  const there = await work("look");
  $("threshold").value = there.threshold;
  $("modes").hidden = !(there.words && there.clicks);
  if (!there.words) document.querySelector("[value=click]").checked = true;
  switched();
  if (there.total <= SMALL && !there.warning) return load();
  $("load").textContent = `Load the model (${megabytes(there.total)})${there.warning ? " all the same" : ""}`;
  $("load").hidden = false;
  $("load").onclick = () => perform(load);
  if (there.warning) throw new Error(there.warning);
});

async function load() {
  $("load").hidden = true;
  try {
    tellHow(await work("load", { wanted: new URLSearchParams(location.search).get("device") }));
    state.ready = true;
  } catch (error) {
    $("load").textContent = "Try again";
    $("load").hidden = false;
    $("load").onclick = () => perform(load);
    throw error;
  }
  if (state.file) await encode();
}

function tellHow({ device, threads }) {
  const words = device === "webgpu" ? "WebGPU" : `WebAssembly, ${threads} ${threads === 1 ? "thread" : "threads"}`;
  const slow = device === "wasm" && !self.crossOriginIsolated ? "; the server's headers allow no more" : "";
  $("about").textContent = `Nothing leaves this browser. ${words}${slow}.`;
}

/* The picture */

$("file").onchange = () => $("file").files.length && choose($("file").files[0]);
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) choose(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", ({ clipboardData }) => clipboardData.files.length && choose(clipboardData.files[0]));

function choose(file) {
  $("file").value = "";
  perform(async () => {
    Object.assign(state, { file: null, encoded: false, bitmap: null, size: null, found: [], marks: [], only: null });
    $("frame").hidden = true;
    $("drop").classList.remove("small");
    listMarks();
    listFound(false);
    let bitmap;
    try {
      bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
    } catch {
      throw new Error(`${file.name} cannot be read as a picture. Give a JPEG, PNG, WebP, GIF or AVIF file.`);
    }
    const { width, height } = bitmap;
    const fitting = Math.sqrt(MOST / (width * height));
    const scale = Math.min(fitting, Math.max(1, LEAST / Math.max(width, height)));
    Object.assign(state, { file, bitmap, size: { width, height }, scale });
    for (const [canvas, share] of [[$("picture"), Math.min(fitting, 1)], [$("over"), scale]]) {
      [canvas.width, canvas.height] = [Math.max(1, Math.round(width * share)), Math.max(1, Math.round(height * share))];
    }
    $("picture").getContext("2d").drawImage(bitmap, 0, 0, $("picture").width, $("picture").height);
    $("frame").style.setProperty("--shape", width / height);
    $("drop").firstElementChild.textContent = "Another picture";
    $("drop").classList.add("small");
    $("frame").hidden = false;
    await paint();
    if (state.ready) await encode();
  }, 1);
}

async function encode() {
  const begun = performance.now();
  await work("encode", { file: state.file });
  Object.assign(state, { encoded: true, took: `Encoded in ${seconds(begun)}.` });
  if (asked()) await ask();
}

/* Prompts */

const prompts = () => {
  const boxes = state.marks.filter(({ kind }) => kind.endsWith("box"));
  const given = { boxes: boxes.map(({ at }) => at), labels: boxes.map(({ kind }) => kind === "box") };
  const texts = $("text").value.split(",").map((text) => text.trim()).filter(Boolean);
  return texts.length ? texts.map((text) => ({ text, ...given })) : boxes.length ? [given] : [];
};

const asked = () => (mode() === "find" ? prompts().length > 0 : state.marks.length > 0);

async function ask() {
  const points = state.marks.filter(({ kind }) => kind.endsWith("point"));
  const box = state.marks.find(({ kind }) => kind === "object-box")?.at ?? null;
  const given =
    mode() === "find"
      ? { prompts: prompts(), threshold: Number($("threshold").value) }
      : { points: points.map(({ at }) => at), labels: points.map(({ kind }) => kind === "point"), box };
  state.only = null;
  const begun = performance.now();
  state.found = await work(mode() === "find" ? "segment" : "click", given);
  state.took = `Answered in ${seconds(begun)}.`;
  state.found.forEach((item, index) => (item.colour = colour(index)));
  listFound(true);
  await paint();
}

$("ask").onsubmit = (event) => {
  event.preventDefault();
  if (state.encoded && asked()) perform(ask);
};
$("text").oninput = () => show(busy ? { words: $("words").textContent.replace(/ …$/, "") } : null);
$("threshold").oninput = () => ($("shown").textContent = Number($("threshold").value).toFixed(2));
$("threshold").onchange = () => state.encoded && asked() && perform(ask);
for (const radio of document.querySelectorAll("[name=mode]")) radio.onchange = () => clear(switched);
$("clear").onclick = () => clear(() => ($("text").value = ""));

function switched() {
  for (const kind of ["find", "click"]) {
    for (const item of document.querySelectorAll(`.${kind}`)) item.classList.toggle("away-mode", mode() !== kind);
  }
  document.querySelector(`[value=${mode() === "find" ? "box" : "point"}]`).checked = true;
  $("go").textContent = mode() === "find" ? "Find" : "Cut out";
  $("shown").textContent = Number($("threshold").value).toFixed(2);
}

function clear(then) {
  Object.assign(state, { marks: [], found: [], only: null });
  then();
  listMarks();
  listFound(false);
  show(null);
  paint();
}

function mark(at, kind) {
  const [width, height] = [state.size.width, state.size.height];
  const inside = at.every((value, index) => value >= 0 && value <= (index % 2 ? height : width));
  if (!inside) return complain(`${at.join(", ")} lies outside the picture, which is ${width} × ${height} pixels.`);
  if (at.length === 4 && !(at[0] < at[2] && at[1] < at[3])) return complain(`A box is x0, y0, x1, y1 with x0 < x1 and y0 < y1, got ${at.join(", ")}.`);
  complain(null);
  if (kind === "object-box") state.marks = state.marks.filter((item) => item.kind !== kind); // an object has one
  state.marks.push({ at, kind });
  listMarks();
  paint();
  if (state.encoded) perform(ask);
}

$("add").onclick = () => {
  const at = $("numbers").value.split(/[\s,;]+/).filter(Boolean).map(Number);
  const point = at.length === 2 && mode() === "click";
  if (!state.size) return complain("Choose a picture first.");
  if (!at.every(Number.isFinite) || !(at.length === 4 || point)) {
    return complain(mode() === "find" ? "Give four numbers: x0, y0, x1, y1." : "Give two numbers x, y, or four: x0, y0, x1, y1.");
  }
  const kind = mode() === "find" ? tool() : point ? (tool() === "not-point" ? "not-point" : "point") : "object-box";
  mark(at, kind);
  $("numbers").value = "";
};
$("numbers").onkeydown = (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  $("add").click();
};

/* Drawing with a mouse, a pen or a finger; with Shift it is an example of what is not wanted. */

let drag = null;
const place = ({ clientX, clientY }) => {
  const { left, top, width, height } = $("over").getBoundingClientRect();
  const inside = (value, most) => Math.round(Math.min(Math.max(value, 0), 1) * most);
  return [inside((clientX - left) / width, state.size.width), inside((clientY - top) / height, state.size.height)];
};
const spanned = ([x0, y0], [x1, y1]) => [Math.min(x0, x1), Math.min(y0, y1), Math.max(x0, x1), Math.max(y0, y1)];

$("over").onpointerdown = (event) => {
  if (event.button || !state.size) return;
  $("over").setPointerCapture(event.pointerId);
  drag = { from: place(event), kind: event.shiftKey ? tool().replace(/^(?=box|point)/, "not-") : tool() };
};
$("over").onpointermove = (event) => {
  if (!drag || drag.kind.endsWith("point")) return;
  drag.at = spanned(drag.from, place(event));
  marks();
};
$("over").onpointerup = (event) => {
  if (!drag) return;
  const { from, kind } = drag;
  drag = null;
  const to = place(event);
  if (kind.endsWith("point")) return mark(to, kind);
  const at = spanned(from, to);
  if (at[2] - at[0] > 1 && at[3] - at[1] > 1) mark(at, kind);
  else marks();
};
$("over").onpointercancel = () => ((drag = null), marks());

/* What is seen */

let masks = null;

async function paint() {
  masks?.close();
  masks = null;
  const canvas = $("over");
  if (state.found.length) {
    const colours = state.found.map(({ colour }) => colour);
    const given = { width: canvas.width, height: canvas.height, colours, only: state.only };
    masks = await work("draw", given);
  }
  if (state.bitmap) marks();
}

function marks() {
  const canvas = $("over");
  const pen = canvas.getContext("2d");
  pen.clearRect(0, 0, canvas.width, canvas.height);
  const unit = canvas.width / (canvas.clientWidth || canvas.width); // of a pixel on the screen
  over(pen, state.scale, unit);
  const line = 2 * unit;
  const drawn = drag?.at ? [...state.marks, drag] : state.marks;
  for (const { at, kind } of drawn) {
    const [x, y, x1, y1] = at.map((value) => value * state.scale);
    pen.setLineDash(kind.startsWith("not") ? [3 * line, 2 * line] : []);
    pen.lineWidth = line;
    for (const [ink, wide] of [["#fff", 2 * line], [kind.startsWith("not") ? "#d1242f" : "#1a7f37", line]]) {
      Object.assign(pen, { strokeStyle: ink, lineWidth: wide });
      pen.beginPath();
      if (kind.endsWith("point")) pen.arc(x, y, 3 * line, 0, 7);
      else pen.rect(x, y, x1 - x, y1 - y);
      pen.stroke();
    }
  }
  const count = state.found.length;
  canvas.setAttribute("aria-label", count ? `${count} found: ${state.found.map(({ label }) => label).join(", ")}` : "The picture");
}

new ResizeObserver(() => state.bitmap && marks()).observe($("over"));

/** Masks, boxes and words over the picture. */
function over(pen, scale, unit) {
  const { width, height } = pen.canvas;
  if (masks) pen.drawImage(masks, 0, 0, width, height);
  const size = 14 * unit;
  pen.setLineDash([]);
  pen.font = `${size}px system-ui, sans-serif`;
  pen.textBaseline = "top";
  state.found.forEach(({ box, label, score, colour }, index) => {
    if (state.only !== null && state.only !== index) return;
    const [x0, y0, x1, y1] = box.map((value) => value * scale);
    const words = `${label} ${score.toFixed(2)}`;
    Object.assign(pen, { strokeStyle: css(colour), fillStyle: css(colour), lineWidth: 1.5 * unit });
    pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
    const [x, y] = [Math.max(x0, 0), Math.max(y0, 0)];
    pen.fillRect(x, y, pen.measureText(words).width + 0.5 * size, 1.3 * size);
    pen.fillStyle = "#000";
    pen.fillText(words, x + 0.25 * size, y + 0.2 * size);
  });
}

function listMarks() {
  const names = { box: "Like", "not-box": "Not like", point: "Point", "not-point": "Outside", "object-box": "Box" };
  $("marks").replaceChildren(
    ...state.marks.map((item) => {
      const row = document.createElement("li");
      const button = document.createElement("button");
      row.append(`${names[item.kind]} ${item.at.join(", ")}`, button);
      Object.assign(button, { type: "button", textContent: "Remove", ariaLabel: `Remove ${names[item.kind]} ${item.at.join(", ")}` });
      button.onclick = () => {
        state.marks = state.marks.filter((other) => other !== item);
        listMarks();
        if (state.encoded && asked()) perform(ask);
        else clear(() => {});
      };
      return row;
    }),
  );
}

function listFound(known) {
  const { found } = state;
  $("count").hidden = !known;
  $("count").textContent = found.length ? `${found.length} found` : "Nothing found. Lower the score, or use other words.";
  $("save").hidden = !found.length;
  $("found").replaceChildren(
    ...found.map(({ label, score, colour }, index) => {
      const row = document.createElement("li");
      const button = Object.assign(document.createElement("button"), { type: "button", ariaPressed: "false" });
      const [dot, name, value] = ["dot", "", "score"].map((kind) => Object.assign(document.createElement("span"), { className: kind }));
      dot.style.background = css(colour);
      [name.textContent, value.textContent] = [label, score.toFixed(2)];
      button.append(dot, name, value);
      button.onclick = () => {
        state.only = state.only === index ? null : index;
        for (const [at, other] of [...$("found").querySelectorAll("button")].entries()) other.ariaPressed = String(state.only === at);
        paint();
      };
      row.append(button);
      return row;
    }),
  );
}

/** The golden ratio keeps neighbours apart; the colours of `sam3x run -o`. */
function colour(index) {
  const hue = ((index * 0.618034) % 1) * 6;
  const channel = (shift) => {
    const at = (shift + hue) % 6;
    return Math.round(255 * (1 - 0.75 * Math.max(0, Math.min(at, 4 - at, 1))));
  };
  return [channel(5), channel(3), channel(1)];
}
const css = ([red, green, blue]) => `rgb(${red} ${green} ${blue})`;

/* Saving */

$("save-json").onclick = () =>
  perform(async () => save(new Blob([await work("json"), "\n"], { type: "application/json" }), "json"));
$("save-picture").onclick = () =>
  perform(async () => {
    const { width, height } = state.size;
    const canvas = new OffscreenCanvas(width, height);
    const pen = canvas.getContext("2d");
    pen.drawImage(state.bitmap, 0, 0);
    over(pen, 1, Math.max(width, height) / 900);
    save(await canvas.convertToBlob({ type: "image/png" }), "png");
  });

function save(blob, ending) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${state.file.name.replace(/\.[^.]*$/, "")}-masks.${ending}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
