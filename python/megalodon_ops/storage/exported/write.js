// Reads the text of the page and writes on. The model's state has a constant size, whatever the text's length.
"use strict";

const element = (id) => document.getElementById(id);
const ARRAYS = { float32: Float32Array, float64: Float64Array, float16: globalThis.Float16Array, int64: BigInt64Array };

// Byte-level BPE of a tokenizer.json of Hugging Face's package `tokenizers`; without merges, a token is a byte.
class Tokenizer {
  constructor(json) {
    const { vocab, merges } = json.model;
    const characters = []; // of bytes; those that cannot be printed have characters from 256 on
    for (let byte = 0, other = 256; byte < 256; byte++) {
      const printable = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
      characters.push(String.fromCharCode(printable ? byte : other++));
    }
    this.characters = characters;
    this.vocab = vocab;
    this.ranks = new Map(merges.map((pair, rank) => [Array.isArray(pair) ? pair.join(" ") : pair, rank]));
    this.words = json.pre_tokenizer.use_regex === false ? /[^]+/gu
      : /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;
    const bytes = new Map(characters.map((character, byte) => [character, byte]));
    this.bytes = new Map(Object.entries(vocab).map(([word, id]) => [id, Uint8Array.from(word, (c) => bytes.get(c))]));
  }

  encode(text) {
    return (text.match(this.words) ?? []).flatMap((word) => {
      const parts = Array.from(new TextEncoder().encode(word), (byte) => this.characters[byte]);
      while (this.ranks.size) {
        let best = Infinity, place = -1;
        for (let i = 0; i + 1 < parts.length; i++) {
          const rank = this.ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
          if (rank < best) [best, place] = [rank, i];
        }
        if (place < 0) break;
        parts.splice(place, 2, parts[place] + parts[place + 1]);
      }
      return parts.map((part) => this.vocab[part]);
    });
  }
}

class Model {
  static async load() {
    const model = new Model();
    ort.env.wasm.numThreads = 1;
    model.config = await (await fetch("config.json")).json();
    model.tokenizer = new Tokenizer(await (await fetch("tokenizer.json")).json());
    model.step = await ort.InferenceSession.create("step.onnx");
    model.prompt = await ort.InferenceSession.create("prompt.onnx");
    model.begin();
    return model;
  }

  // Forget the text.
  begin() {
    this.text = "";
    this.logits = null;
    this.decoder = new TextDecoder();
    this.state = {};
    for (const { name, dtype, shape } of this.config.state) {
      const dims = [1, ...shape.slice(1)];
      this.state[name] = new ort.Tensor(dtype, new ARRAYS[dtype](dims.reduce((a, b) => a * b)), dims);
    }
  }

  // Read tokens; this.logits are those after the last one.
  async read(tokens) {
    const chunk = this.config.model.chunk_size;
    for (let first = 0; first < tokens.length; first += chunk) {
      const piece = BigInt64Array.from(tokens.slice(first, first + chunk), BigInt);
      const input = new ort.Tensor("int64", piece, [1, piece.length]);
      const results = await (piece.length > 1 ? this.prompt : this.step).run({ tokens: input, ...this.state });
      for (const name in this.state) this.state[name] = results[`new.${name}`];
      const logits = results.logits.data;
      this.logits = logits.subarray(logits.length - results.logits.dims[2]);
    }
  }

  // Read what follows the text that the state holds, or a new text.
  async readText(text) {
    if (this.logits === null || !text.startsWith(this.text)) this.begin();
    const start = this.logits === null ? [this.config.tokenizer.start] : [];
    await this.read([...start, ...this.tokenizer.encode(text.slice(this.text.length))]);
    this.text = text;
  }

  // Draw a token by its probability or, with temperature 0, take the likeliest one.
  draw(temperature) {
    let best = 0;
    this.logits.forEach((logit, id) => { if (logit > this.logits[best]) best = id; });
    if (temperature <= 0) return best;
    const weights = Array.from(this.logits, (logit) => Math.exp((logit - this.logits[best]) / temperature));
    let left = Math.random() * weights.reduce((a, b) => a + b);
    const drawn = weights.findIndex((weight) => (left -= weight) < 0);
    return drawn < 0 ? best : drawn;
  }

  // Write one token: return its text, or null at the end of the document.
  async write(temperature) {
    const token = this.draw(temperature);
    if (token === this.config.tokenizer.end || token === this.config.tokenizer.start) return null;
    await this.read([token]);
    const text = this.decoder.decode(this.tokenizer.bytes.get(token) ?? new Uint8Array(), { stream: true });
    this.text += text;
    return text;
  }
}

let stopped = false;

async function writeOn(model) {
  const area = element("text"), limit = Number(element("limit").value);
  const temperature = Number(element("temperature").value);
  stopped = false;
  element("write").disabled = area.readOnly = true;
  element("stop").disabled = false;
  element("status").textContent = "Reading ...";
  const begin = performance.now();
  await model.readText(area.value);
  const read = performance.now();
  let count = 0, written = "", shown = read;
  const show = async (end) => {
    area.value += written;
    area.scrollTop = area.scrollHeight;
    [written, shown] = ["", performance.now()];
    const rate = count / (shown - read) * 1000;
    element("status").textContent = `${end}${count} tokens, ${rate.toFixed(1)} tokens a second; ` +
      `the text was read in ${((read - begin) / 1000).toFixed(2)} s`;
    await new Promise((resolve) => setTimeout(resolve)); // lets the page be drawn
  };
  while (count < limit && !stopped) {
    const text = await model.write(temperature);
    if (text === null) break;
    [written, count] = [written + text, count + 1];
    if (performance.now() - shown > 100) await show("Writing: ");
  }
  await show("Done: ");
  element("write").disabled = area.readOnly = false;
  element("stop").disabled = true;
}

const failed = (error) => { element("status").textContent = `Error: ${error.message ?? error}`; };
element("stop").onclick = () => { stopped = true; };
Model.load().then((model) => {
  element("write").onclick = () => writeOn(model).catch(failed);
  element("write").disabled = false;
  element("status").textContent = "Ready.";
}, failed);
