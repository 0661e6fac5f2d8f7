/**
 * An exported pipeline in JavaScript, as `sam3x.runtime.Segmenter` is in Python: for the page's worker, and for Node.
 *
 * A picture is encoded once, then asked by words and boxes (`segment`) or by clicks (`click`) as often as you like.
 */

const BATCH = 4; // prompts that go through the model together
const EMPTY = { data: new Float32Array(0), dims: [0, 1, 1] };

/** What is wrong with a picture or a prompt, in words for who gave it. */
export class PromptError extends Error {}

export class Segmenter {
  #asked = {}; // the last question and what the decoder made of it: another threshold asks only for masks

  /**
   * @param manifest what `manifest.json` holds.
   * @param ort onnxruntime-web, of which `Tensor` is used.
   * @param open a component of the manifest → its InferenceSession, now or later.
   * @param tokenizer a `Tokenizer` of @huggingface/tokenizers; without one words cannot be read.
   */
  constructor({ manifest, ort, open, tokenizer = null }) {
    Object.assign(this, { manifest, ort, open, tokenizer });
    const heads = manifest.components.filter(({ name }) => ["segmenter", "decoder"].includes(name));
    this.batch = Math.min(BATCH, ...heads.map(({ ranges }) => (ranges.prompts ?? [1, 1])[1]));
  }

  /** Run the vision encoder on a picture of 8-bit RGBA values, row by row; its transparency is not looked at. */
  async encode({ data, width, height }) {
    const { image_size: size, mean, std } = this.manifest;
    const planes = normalized(resized(data, width, height, size), mean, std);
    const tensors = await this.#run("vision_encoder", { image: this.#tensor("float32", planes, [1, 3, size, size]) });
    return { width, height, tensors };
  }

  /**
   * Everything that any of the prompts describes.
   *
   * @param encoded what `encode` gave.
   * @param prompts a list of `{text, ids, boxes, labels}`: words or token ids, or neither; boxes of x0, y0, x1, y1 in pixels; for
   *     each true (like this) or false (not like this).
   * @param threshold detections score above it; by default the source's own.
   * @returns a list of `{label, prompt, score, box, mask}`, those of one prompt in the order of the model's queries; `mask` has
   *     `data`, `width`, `height` and `border`, see `stretched`.
   */
  async segment(encoded, prompts, threshold = this.manifest.threshold) {
    const read = prompts.map((prompt) => this.#read(prompt, encoded));
    if (!read.length) throw new PromptError("There is nothing to look for. Give words, boxes or both.");
    const found = [];
    for (let start = 0; start < read.length; start += this.batch) {
      const batch = read.slice(start, start + this.batch);
      const each = await (this.fused ? this.#joined(encoded, batch, threshold) : this.#asOne(encoded, batch, threshold));
      each.forEach((item, row) => found.push(...item.map((one) => ({ label: batch[row].label, prompt: start + row, ...one }))));
    }
    return found;
  }

  /** Whether one file goes from text features to the masks of what was found. */
  get fused() {
    return this.manifest.components.some(({ name }) => name === "segmenter");
  }

  /**
   * The masks of the object that points and a box mean, best first: three of one point alone, else one.
   *
   * @param points a list of x, y in pixels. labels for each true (of the object) or false (outside it). box x0, y0, x1, y1.
   */
  async click(encoded, { points = [], labels = points.map(() => true), box = null }) {
    const { clicks, image_size: size } = this.manifest;
    const { width, height } = encoded;
    const corners = box ? [box.slice(0, 2), box.slice(2)] : [];
    const rows = points.length + corners.length + 1;
    if (rows === 1) throw new PromptError("Nothing is clicked. Give a point or a box.");
    if (labels.length !== points.length) throw new PromptError(`${labels.length} labels for ${points.length} points.`);
    if (box) checkBox(box, width, height);
    for (const [x, y] of points) {
      if (!(x >= 0 && y >= 0 && x <= width && y <= height)) {
        throw new PromptError(`The point ${x}, ${y} lies outside the picture, which is ${width} × ${height} pixels.`);
      }
    }
    const part = this.part("interactive_head");
    const most = (part.ranges.points ?? [1, 1])[1];
    if (rows > most) throw new PromptError(`The model takes at most ${most - 1} points of an object, two of them for a box.`);
    const shape = part.inputs.find(({ name }) => name === "mask_input").shape.slice(-2);
    const coords = new Float32Array(2 * rows);
    [...corners, ...points].forEach(([x, y], at) => {
      coords[2 * at] = Math.fround(Math.fround(x) / width) * size;
      coords[2 * at + 1] = Math.fround(Math.fround(y) / height) * size;
    });
    const kinds = [...corners.map((_, at) => 2 + at), ...labels.map(Number), -1]; // the last row is one of none
    const out = await this.#run("interactive_head", {
      ...encoded.tensors,
      point_coords: this.#tensor("float32", coords, [1, rows, 2]),
      point_labels: this.#tensor("int64", BigInt64Array.from(kinds, BigInt), [1, rows]),
      mask_input: this.#tensor("float32", new Float32Array(shape[0] * shape[1]), [1, 1, ...shape]),
      has_mask_input: this.#tensor("bool", [false], [1]),
    });
    const several = points.length === 1 && !box; // upstream's advice: three of a prompt that may mean several things
    const found = (several ? [1, 2, 3] : [0]).map((at) => {
      const data = mended(plane(out.low_res_masks, at), shape, clicks);
      const mask = { data, height: shape[0], width: shape[1], border: clicks.mask_threshold };
      return { label: "object 1", prompt: 0, score: out.iou_predictions.data[at], mask, box: null };
    });
    for (const item of found) item.box = reach(stretched(item.mask, width, height), width, height);
    return found.sort((one, other) => other.score - one.score);
  }

  /** The component of that name. */
  part(name) {
    const part = this.manifest.components.find((item) => item.name === name);
    if (!part) throw new PromptError(`The pipeline was exported without its ${name}.`);
    return part;
  }

  /** Token ids of a text, begin and end included. */
  ids(text) {
    if (!this.tokenizer) throw new PromptError("The pipeline was exported without a vocabulary, so words cannot be read.");
    const { context_length: most, unescape_html: unescape } = this.manifest;
    const clean = unescape ? unescaped(unescaped(text)) : text;
    const unknown = this.tokenizer.token_to_id(this.tokenizer.tokenizer?.model?.unk_token); // WordLevel leaves holes
    const found = this.tokenizer.encode(clean.split(/\s+/u).filter(Boolean).join(" ")).ids;
    const ids = found.map((id) => id ?? unknown).filter((id) => id !== undefined);
    return ids.length <= most ? ids : [...ids.slice(0, most - 1), ids.at(-1)];
  }

  #read({ text = "", ids = null, boxes = [], labels = boxes.map(() => true) }, { width, height }) {
    const words = text.trim();
    if (!words && !ids && !boxes.length) throw new PromptError("There is nothing to look for. Give words, boxes or both.");
    const most = (this.part(this.fused ? "segmenter" : "prompt_encoder").ranges.boxes ?? [1, 1])[1];
    if (boxes.length > most) throw new PromptError(`The model takes at most ${most} boxes of a prompt, got ${boxes.length}.`);
    const fractions = boxes.map((box) => {
      checkBox(box, width, height);
      const [x0, y0, x1, y1] = box;
      return [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height];
    });
    const label = words || (ids ? `ids [${ids.join(", ")}]` : "boxes");
    return { label, ids: ids ?? this.ids(words || this.manifest.box_text), fractions, labels };
  }

  /** The tensors of some prompts for the text encoder and what comes after it. */
  async #prompted(encoded, batch) {
    const count = batch.length;
    const { context_length, fixed_length, pad_id } = this.manifest;
    const length = fixed_length ? context_length : Math.max(...batch.map(({ ids }) => ids.length));
    const boxes = Math.max(1, ...batch.map(({ fractions }) => fractions.length));
    const ids = new BigInt64Array(count * length).fill(BigInt(pad_id));
    const valid = new Uint8Array(count * length);
    const corners = new Float32Array(4 * count * boxes).fill(0.5);
    const labels = new BigInt64Array(count * boxes).fill(1n);
    const padding = new Uint8Array(count * boxes).fill(1); // no box: one that is padding
    batch.forEach((prompt, row) => {
      ids.set(prompt.ids.map(BigInt), row * length);
      valid.fill(1, row * length, row * length + prompt.ids.length);
      corners.set(prompt.fractions.flat(), 4 * row * boxes);
      labels.set(prompt.labels.map((like) => BigInt(like)), row * boxes);
      padding.fill(0, row * boxes, row * boxes + prompt.fractions.length);
    });
    const tensors = {
      ...encoded.tensors,
      input_ids: this.#tensor("int64", ids, [count, length]),
      attention_mask: this.#tensor("bool", valid, [count, length]),
      boxes: this.#tensor("float32", corners, [count, boxes, 4]),
      box_labels: this.#tensor("int64", labels, [count, boxes]),
      box_mask: this.#tensor("bool", padding, [count, boxes]),
    };
    return { ...tensors, ...(await this.#run("text_encoder", tensors)) };
  }

  async #decoded(encoded, batch) {
    const key = JSON.stringify(batch);
    if (this.#asked.encoded === encoded && this.#asked.key === key) return this.#asked.tensors;
    this.#asked = {};
    let tensors = await this.#prompted(encoded, batch);
    for (const name of ["prompt_encoder", "fusion_encoder", "decoder"]) {
      tensors = { ...tensors, ...(await this.#run(name, tensors)) };
    }
    this.#asked = { encoded, key, tensors };
    return tensors;
  }

  /** What each prompt found, by the six files. */
  async #asOne(encoded, batch, threshold) {
    const tensors = await this.#decoded(encoded, batch);
    const { pred_logits: logits, presence_logit_dec: presence, pred_boxes: boxes, queries } = tensors;
    const [, count, width] = queries.dims;
    const found = [];
    for (let row = 0; row < batch.length; row++) {
      const there = sigmoid(presence.data[row]);
      const scores = Array.from(logits.data.subarray(row * count, (row + 1) * count), (x) => Math.fround(sigmoid(x) * there));
      const kept = scores.flatMap((score, query) => (score > Math.fround(threshold) ? [query] : []));
      let masks = EMPTY;
      if (kept.length) { // the mask head sees what is wanted alone
        const wanted = new Float32Array(kept.length * width);
        kept.forEach((query, at) => wanted.set(rows(queries, row, row + 1).data.subarray(query * width, (query + 1) * width), at * width));
        const given = { ...encoded.tensors, queries: this.#tensor("float32", wanted, [1, kept.length, width]) };
        for (const name of ["encoded", "prompt", "prompt_mask"]) given[name] = this.#rows(tensors[name], row, row + 1);
        const { pred_masks } = await this.#run("mask_head", given);
        masks = { data: pred_masks.data, dims: pred_masks.dims.slice(1) };
      }
      found.push(kept.map((query, at) => this.#detection(encoded, scores[query], boxes, row * count + query, masks, at)));
    }
    return found;
  }

  /** What each prompt found, by the three files of `--fuse`. */
  async #joined(encoded, batch, threshold) {
    const tensors = await this.#prompted(encoded, batch);
    const given = { ...tensors, threshold: this.#tensor("float32", [threshold], [1]) };
    const out = await this.#run("segmenter", given);
    const found = batch.map(() => []);
    out.found_prompts.data.forEach((row, at) => {
      if (Number(row) >= batch.length) return; // a prompt that was repeated to fill the batch
      const { data } = out.found_scores;
      found[Number(row)].push(this.#detection(encoded, data[at], out.found_boxes, at, out.found_masks, at));
    });
    return found;
  }

  #detection({ width, height }, score, boxes, at, masks, index) {
    const [cx, cy, w, h] = boxes.data.subarray(4 * at, 4 * at + 4);
    const corner = (centre, half, size) => Math.fround(Math.fround(centre + half) * size);
    const box = [corner(cx, -w / 2, width), corner(cy, -h / 2, height), corner(cx, w / 2, width), corner(cy, h / 2, height)];
    const logits = this.manifest.mask_interpolation === "logits";
    const data = logits ? plane(masks, index) : plane(masks, index).map(sigmoid);
    return { score, box, mask: { data, height: masks.dims.at(-2), width: masks.dims.at(-1), border: logits ? 0 : 0.5 } };
  }

  /** The outputs of one component, under the names of the pipeline's tensors. */
  async #run(name, tensors) {
    const part = this.part(name);
    const perPrompt = part.inputs.filter(({ name: input, shape }) => shape[0] === "prompts" && !(input in part.constants));
    const own = Object.fromEntries(part.inputs.map((input) => [input.name, tensors[part.reads[input.name]]]));
    const given = Math.max(1, ...perPrompt.map((input) => own[input.name].dims[0]));
    const least = (part.ranges.prompts ?? [1, 1])[0]; // a file for a number of prompts, or for at least some
    for (const { name: input, shape } of part.inputs) {
      if (input in part.constants) own[input] = this.#tensor("bool", [part.constants[input]].flat(), shape);
    }
    for (const input of perPrompt) own[input.name] = this.#filled(own[input.name], given, Math.max(given, least));
    const session = await this.open(part);
    const outputs = await session.run(own);
    const short = perPrompt.length && given < least && !("found_prompts" in part.writes);
    return Object.fromEntries(
      Object.entries(part.writes).map(([output, tensor]) => [tensor, short ? this.#rows(outputs[output], 0, given) : outputs[output]]),
    );
  }

  /** A picture's tensor repeated for every prompt; the last prompt repeated to `count`. */
  #filled(tensor, given, count) {
    const have = tensor.dims[0];
    if (have === count) return tensor;
    const size = tensor.data.length / have;
    const data = new tensor.data.constructor(size * count);
    for (let row = 0; row < count; row++) {
      const from = have === given ? Math.min(row, have - 1) : 0;
      data.set(tensor.data.subarray(from * size, (from + 1) * size), row * size);
    }
    return this.#tensor(tensor.type, data, [count, ...tensor.dims.slice(1)]);
  }

  #rows(tensor, start, end) {
    const { data, dims } = rows(tensor, start, end);
    return this.#tensor(tensor.type, data, dims);
  }

  #tensor(type, data, dims) {
    return new this.ort.Tensor(type, data, dims);
  }
}

/**
 * A mask at the size of a picture, bilinear as `torch.nn.functional.interpolate`: 1 where it is, row by row.
 *
 * @param mask `data` (height × width values of the model) and `border`, above which a value is part of the mask.
 */
export function stretched({ data, width: have, height: lines, border }, width, height) {
  const across = steps(have, width);
  const down = steps(lines, height);
  const line = new Float32Array(have);
  const found = new Uint8Array(width * height);
  for (let y = 0; y < height; y++) {
    const [above, below] = [down.low[y] * have, down.high[y] * have];
    for (let x = 0; x < have; x++) line[x] = mixed(data[above + x], data[below + x], down.share[y]);
    for (let x = 0; x < width; x++) {
      found[y * width + x] = mixed(line[across.low[x]], line[across.high[x]], across.share[x]) > border ? 1 : 0;
    }
  }
  return found;
}

/** Lengths of the runs of equal values, column by column, the first of zeros: COCO's uncompressed RLE. */
export function runLengths(mask, width, height) {
  const runs = [];
  let [value, length] = [0, 0];
  for (let x = 0; x < width; x++) {
    for (let y = 0; y < height; y++) {
      if (mask[y * width + x] !== value) {
        runs.push(length);
        [value, length] = [1 - value, 0];
      }
      length++;
    }
  }
  return [...runs, length];
}

/** RGBA of a picture → RGB of size × size, bilinear with antialiasing in the integer arithmetic of torch's `Resize` on x86. */
export function resized(rgba, width, height, size) {
  const lines = new Uint8Array(height * size * 3);
  const across = filter(width, size);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < size; x++) {
      for (let channel = 0; channel < 3; channel++) {
        const at = 4 * (y * width + across.starts[x]) + channel;
        lines[3 * (y * size + x) + channel] = across.sum(rgba, x, at, 4);
      }
    }
  }
  const found = new Uint8Array(size * size * 3);
  const down = filter(height, size);
  for (let y = 0; y < size; y++) {
    for (let at = 0; at < 3 * size; at++) found[3 * size * y + at] = down.sum(lines, y, 3 * size * down.starts[y] + at, 3 * size);
  }
  return found;
}

/** How each of `size` values is made of `have`: the first one, and weights as integers, shifted by so many bits. */
function filter(have, size) {
  const scale = have / size;
  const support = Math.max(scale, 1);
  const starts = new Int32Array(size);
  const windows = [];
  let largest = 0;
  for (let index = 0; index < size; index++) {
    const centre = scale * (index + 0.5);
    starts[index] = Math.max(Math.trunc(centre - support + 0.5), 0);
    const count = Math.min(Math.trunc(centre + support + 0.5), have) - starts[index];
    const weights = Array.from({ length: count }, (_, tap) =>
      Math.max(1 - Math.abs((tap + starts[index] - centre + 0.5) / support), 0));
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    windows.push(weights.map((weight) => weight / total));
    largest = Math.max(largest, ...windows[index]);
  }
  let bits = 0;
  while (bits < 22 && Math.trunc(0.5 + largest * 2 ** (bits + 1)) < 1 << 15) bits++;
  const integers = windows.map((weights) => Int32Array.from(weights, (weight) => Math.trunc(0.5 + weight * 2 ** bits)));
  const half = 1 << (bits - 1);
  const sum = (values, index, at, step) => {
    if (have === size) return values[at + step * (index - starts[index])];
    const weights = integers[index];
    let total = half;
    for (let tap = 0; tap < weights.length; tap++) total += values[at + tap * step] * weights[tap];
    return Math.min(Math.max(total >> bits, 0), 255);
  };
  return { starts, sum };
}

/** RGB by pixel → planes of (value / 255 − mean) / std. */
function normalized(rgb, mean, std) {
  const area = rgb.length / 3;
  const planes = new Float32Array(rgb.length);
  for (let channel = 0; channel < 3; channel++) {
    const table = Float32Array.from({ length: 256 }, (_, value) =>
      Math.fround(Math.fround(value / 255) - Math.fround(mean[channel])) / Math.fround(std[channel]));
    for (let at = 0; at < area; at++) planes[channel * area + at] = table[rgb[3 * at + channel]];
  }
  return planes;
}

/** Holes and specks of a mask of clicks filled and removed, as upstream's predictor does before it is stretched. */
export function mended(data, [height, width], { mask_threshold: border, max_hole_area: holes, max_sprinkle_area: specks }) {
  const found = data.slice();
  for (const [most, value, inside] of [[holes, border + 10, (x) => x <= border], [specks, border - 10, (x) => x > border]]) {
    if (most > 0) for (const region of regions(data, width, height, inside)) if (region.length <= most) for (const at of region) found[at] = value;
  }
  return found;
}

/** Every region of values that are `inside`, as a list of places; corners connect. */
function* regions(data, width, height, inside) {
  const seen = new Uint8Array(data.length);
  for (let start = 0; start < data.length; start++) {
    if (seen[start] || !inside(data[start])) continue;
    const region = [start];
    seen[start] = 1;
    for (let next = 0; next < region.length; next++) {
      const [x, y] = [region[next] % width, Math.trunc(region[next] / width)];
      for (let v = Math.max(y - 1, 0); v <= Math.min(y + 1, height - 1); v++) {
        for (let u = Math.max(x - 1, 0); u <= Math.min(x + 1, width - 1); u++) {
          const at = v * width + u;
          if (!seen[at] && inside(data[at])) {
            seen[at] = 1;
            region.push(at);
          }
        }
      }
    }
    yield region;
  }
}

/** x0, y0, x1, y1 of what a mask reaches over; zeros where it is empty. */
function reach(mask, width, height) {
  let [x0, y0, x1, y1] = [width, height, 0, 0];
  mask.forEach((value, at) => {
    if (!value) return;
    const [x, y] = [at % width, Math.trunc(at / width)];
    [x0, y0, x1, y1] = [Math.min(x0, x), Math.min(y0, y), Math.max(x1, x + 1), Math.max(y1, y + 1)];
  });
  return x1 ? [x0, y0, x1, y1] : [0, 0, 0, 0];
}

function checkBox(box, width, height) {
  const [x0, y0, x1, y1] = box;
  const size = `the picture, which is ${width} × ${height} pixels`;
  if (!(box.length === 4 && box.every(Number.isFinite) && x1 > x0 && y1 > y0)) {
    throw new PromptError(`A box is x0, y0, x1, y1 in pixels with x0 < x1 and y0 < y1, got ${box.join(", ")}.`);
  }
  if (x1 <= 0 || y1 <= 0 || x0 >= width || y0 >= height) throw new PromptError(`The box ${box.join(", ")} lies outside ${size}.`);
  if (x0 < -width || y0 < -height || x1 > 2 * width || y1 > 2 * height) {
    throw new PromptError(`The box ${box.join(", ")} reaches further over the edge than ${size}, is large.`);
  }
}

/** Where each of `size` values lies between two of `have`, and how far, in float32 as torch computes it. */
function steps(have, size) {
  const [low, high, share] = [new Int32Array(size), new Int32Array(size), new Float32Array(size)];
  const scale = Math.fround(have / size);
  for (let index = 0; index < size; index++) {
    const at = Math.max(Math.fround(Math.fround(Math.fround(index + 0.5) * scale) - 0.5), 0);
    low[index] = Math.min(Math.trunc(at), have - 1);
    high[index] = Math.min(low[index] + 1, have - 1);
    share[index] = at - low[index];
  }
  return { low, high, share };
}

const mixed = (one, other, share) => Math.fround(one + Math.fround(Math.fround(other - one) * share));

const sigmoid = (x) => Math.fround(1 / (1 + Math.exp(-x)));

/** The values of one of a tensor's last two dimensions, a copy. */
const plane = ({ data, dims }, index) => {
  const size = dims.at(-1) * dims.at(-2);
  return data.slice(index * size, (index + 1) * size);
};

const rows = ({ data, dims }, start, end) => {
  const size = data.length / dims[0];
  return { data: data.subarray(start * size, end * size), dims: [end - start, ...dims.slice(1)] };
};

const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };

const unescaped = (text) =>
  text.replace(/&(?:#(\d+)|#x([\da-f]+)|(\w+));/giu, (whole, decimal, hex, name) => {
    const code = decimal ? Number(decimal) : hex ? parseInt(hex, 16) : NaN;
    return code <= 0x10ffff ? String.fromCodePoint(code) : ENTITIES[name?.toLowerCase()] ?? whole;
  });
