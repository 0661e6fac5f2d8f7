/** Everything heavy, away from the page: files, sessions of ONNX Runtime, pictures, masks. */

import { PromptError, Segmenter, runLengths, stretched } from "./segmenter.mjs";

const HERE = new URL("./", import.meta.url);

let site, manifest, ort, segmenter, encoded, picture;
let [found, asked] = [[], []]; // detections, and the prompts in words
let device = "wasm";
let failed = false; // the GPU, once
const sessions = new Map();

const actions = { look, load, encode, segment, click, draw, json };
let turn = Promise.resolve();

self.onmessage = ({ data: { id, action, ...given } }) => {
  turn = turn.then(async () => {
    try {
      const result = await attempted(action, given);
      self.postMessage({ id, result }, result instanceof ImageBitmap ? [result] : []);
    } catch (error) {
      if (!(error instanceof PromptError)) console.error(error);
      self.postMessage({ id, error: inWords(error) });
    }
  });
};

/** An action; where the GPU fails it, because it was lost or lacks something, once more on the CPU, as all that follow. */
async function attempted(action, given) {
  try {
    return await actions[action](given);
  } catch (error) {
    if (device !== "webgpu" || error instanceof PromptError) throw error;
    console.warn(error);
    [device, failed] = ["wasm", true];
    await closeAll();
    self.postMessage({ how: how() });
    return await actions[action](given);
  }
}

/** What is there to load, before any of it is. */
async function look() {
  site = await fetched("site.json").then((response) => response.json());
  manifest = await fetched("manifest.json").then((response) => response.json());
  const total = Object.values(site.bytes).reduce((sum, bytes) => sum + bytes, 0);
  const memory = navigator.deviceMemory ? navigator.deviceMemory * 2 ** 30 : Infinity; // of 8 GB or more it says 8
  const largest = Math.max(...manifest.components.map(bytesOf));
  const short = 2 * largest > memory / 2; // beside the weights, what is computed with them, and everything else that runs
  const tight = `Its largest part has ${megabytes(largest)}, which may be more than this device's memory allows a tab.`;
  const { words, clicks, too_large: tooLarge, versions } = site;
  const { source, threshold } = manifest;
  return { total, words, clicks, source, threshold, versions, warning: tooLarge ?? (short ? tight : null) };
}

/** Get the files, from the browser's cache where it has them, and open as many components as are kept open. */
async function load({ wanted }) {
  const best = !failed && (await gpu()) ? "webgpu" : "wasm";
  device = wanted === "wasm" ? wanted : best;
  ort = await import(`./ort/ort.${device}.min.mjs`);
  ort.env.logLevel = "error"; // else every node that stays on the CPU beside a GPU is a warning
  ort.env.wasm.wasmPaths = new URL("ort/", HERE).href;
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency ?? 1, 8) : 1;
  await forgetOthers();
  const tokenizer = manifest.tokenizer ? await vocabulary(manifest.tokenizer) : null;
  segmenter = new Segmenter({ manifest, ort, tokenizer, open });
  let kept = 0;
  for (const part of manifest.components) {
    kept += bytesOf(part);
    if (kept <= site.open_together) await open(part);
    else for (const name of filesOf(part)) await bytes(name);
  }
  return how();
}

const how = () => ({ device, threads: ort.env.wasm.numThreads });

async function encode({ file }) {
  tell("Reading the picture");
  encoded = picture = undefined;
  found = [];
  const { data, width, height } = await pixels(file);
  tell("Encoding the picture");
  encoded = await segmenter.encode({ data, width, height });
  picture = file.name;
  return { width, height };
}

async function segment({ prompts, threshold }) {
  tell("Looking for it");
  found = await segmenter.segment(encoded, prompts, threshold);
  asked = prompts.map(({ text }) => text || "boxes");
  return facts();
}

async function click({ points, labels, box }) {
  tell("Cutting it out");
  found = (await segmenter.click(encoded, { points, labels, box })).slice(0, 1);
  asked = [found[0].label];
  return facts();
}

const facts = () => found.map(({ label, prompt, score, box }) => ({ label, prompt, score, box }));

/** The masks in their colours, see-through, at a size of the picture; of all detections or of one. */
function draw({ width, height, colours, only }) {
  const values = new Uint8ClampedArray(4 * width * height);
  found.forEach(({ mask }, index) => {
    if (only !== null && only !== index) return;
    const own = stretched(mask, width, height);
    own.forEach((inside, at) => {
      if (!inside) return;
      const share = values[4 * at + 3] ? 0.5 : 1; // over another mask both are seen
      for (let channel = 0; channel < 3; channel++) {
        values[4 * at + channel] += (colours[index][channel] - values[4 * at + channel]) * share;
      }
      values[4 * at + 3] = 128;
    });
  });
  return createImageBitmap(new ImageData(values, width, height));
}

/** What was found, as `sam3x run --json` writes it. */
function json() {
  const { width, height } = encoded;
  const detections = found.map(({ label, prompt, score, box, mask }) => {
    const counts = runLengths(stretched(mask, width, height), width, height);
    return { label, prompt, score, box, mask: { size: [height, width], counts } };
  });
  return JSON.stringify({ picture, width, height, prompts: asked, detections });
}

/** The values of a picture as its file has them: turned as its EXIF orientation says, colours not converted. */
async function pixels(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    throw new PromptError(`${file.name} cannot be read as a picture. Give a JPEG, PNG, WebP, GIF or AVIF file.`);
  }
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  if (!context) throw new PromptError(`${file.name} has ${width} × ${height} pixels, more than this browser draws.`);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, width, height);
}

/** A session of a component; where all do not fit at once, the others are let go of first. */
async function open(part) {
  if (sessions.has(part.name)) return sessions.get(part.name);
  const held = [...sessions.keys()].reduce((sum, name) => sum + bytesOf(segmenter.part(name)), 0);
  if (held + bytesOf(part) > site.open_together) await closeAll();
  const [model, weights] = filesOf(part);
  const externalData = weights ? [{ path: weights, data: await bytes(weights) }] : [];
  const options = { externalData, enableMemPattern: false }; // with it, memory of a second run lies beside that of the first
  const graph = await bytes(model);
  tell(`Opening ${part.name}`);
  sessions.set(part.name, await ort.InferenceSession.create(graph, { ...options, executionProviders: [device] }));
  return sessions.get(part.name);
}

async function closeAll() {
  for (const session of sessions.values()) await session.release();
  sessions.clear();
}

/** A file of the manifest, from the cache or from the server; refused where it is not the one that was exported. */
async function bytes(name) {
  const key = new URL(`sha256/${manifest.files[name]}`, HERE);
  const cache = await ownCache();
  const kept = await cache?.match(key);
  if (kept) return new Uint8Array(await kept.arrayBuffer());
  const response = await fetched(name, cache ? "no-store" : "default"); // it is stored once
  const data = new Uint8Array(site.bytes[name]);
  let done = 0;
  const reader = response.body.getReader();
  for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
    if (done + piece.value.length > data.length) throw damaged(name);
    data.set(piece.value, done);
    done += piece.value.length;
    tell(`Loading ${name}`, done, data.length);
  }
  if (done !== data.length || ![undefined, manifest.files[name]].includes(await sha256(data))) throw damaged(name);
  try {
    await cache?.put(key, new Response(data));
  } catch {
    tell("The browser has no room to keep the files"); // they are loaded again next time
  }
  return data;
}

const damaged = (name) => new PromptError(`${name} is not as it was exported. Load the page again, or write it anew with sam3x web.`);

/** undefined where the browser computes none: over http from another machine. */
async function sha256(data) {
  if (!self.crypto.subtle) return undefined;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

const ownCache = async () => (self.caches ? caches.open(`sam3x ${HERE.pathname}`) : null);

/** Drop what an earlier export left in the cache. */
async function forgetOthers() {
  const cache = await ownCache();
  const own = new Set(Object.values(manifest.files));
  for (const request of (await cache?.keys()) ?? []) {
    if (!own.has(request.url.split("/").at(-1))) await cache.delete(request);
  }
}

async function fetched(name, cache = "default") {
  let response;
  try {
    response = await fetch(new URL(name, HERE), { cache });
  } catch {
    throw new PromptError(`${name} cannot be loaded: the server does not answer.`);
  }
  if (!response.ok) throw new PromptError(`${name} cannot be loaded: the server answers ${response.status}. Write the page anew with sam3x web.`);
  return response;
}

async function vocabulary(name) {
  const { Tokenizer } = await import("./tokenizers/tokenizers.min.mjs");
  return new Tokenizer(JSON.parse(new TextDecoder().decode(await bytes(name))), {});
}

async function gpu() {
  try {
    return Boolean(await navigator.gpu?.requestAdapter());
  } catch {
    return false;
  }
}

const filesOf = ({ file }) => [file, `${file}.data`].filter((name) => name in site.bytes);
const bytesOf = (part) => filesOf(part).reduce((sum, name) => sum + site.bytes[name], 0);
const megabytes = (count) => `${(count / 1e6).toFixed(count < 1e7 ? 1 : 0)} MB`;
const tell = (words, done = null, total = null) => self.postMessage({ progress: { words, done, total } });

function inWords(error) {
  if (error instanceof PromptError) return error.message;
  const words = String(error?.message ?? error);
  if (/bad_alloc|out of memory|allocation failed|out of bounds|Invalid array length/i.test(words)) {
    return "There is not enough memory in this tab. Close others, or use a smaller model: --weights int8, --precision fp16.";
  }
  return `${words.split("\n")[0].replace(/\.$/, "")}.`;
}
