// The pattern language of seqarch/models/pattern.py and pattern_options.py: the same grammar, the same errors.
(function (root) {
  "use strict";

  const MOST = 10000; // layers
  const DEEPEST = 100; // open parentheses
  const DEEPEST_VALUE = 20; // open brackets in a value
  const SHARING = ["share", "adapter_rank", "adapted"];
  const IDENTIFIER = "[A-Za-z_][\\p{L}\\p{N}_]*";
  const NAME = `${IDENTIFIER}(?:\\.${IDENTIFIER})*(?::${IDENTIFIER})?`;
  const TOKEN = new RegExp(`[\\s,]*(?:([0-9]+)[\\s,]*\\*|(${NAME})|([()+/]))`, "uy");
  const WHOLE_NAME = new RegExp(`^(?:${NAME})$`, "u");
  const BEGIN = new RegExp(`\\s*\\(\\s*${IDENTIFIER}\\s*=`, "uy");
  const OPTION = new RegExp(IDENTIFIER, "uy");
  const WORD = /[A-Za-z_][\p{L}\p{N}_.-]*/uy;
  const NUMBER = /[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\p{L}\p{N}_.])/uy;
  const STRING = /'[^']*'|"[^"]*"/uy;
  const CONSTANTS = { true: true, True: true, false: false, False: false, null: null, None: null };

  class PatternError extends Error {}

  const matchAt = (expression, text, at) => {
    expression.lastIndex = at;
    return expression.exec(text);
  };

  const quoted = (text) => (text.includes("'") && !text.includes('"') ? `"${text}"` : `'${text.replaceAll("'", "\\'")}'`);

  // As Python's reprlib shortens a long text.
  const shown = (text) => {
    const whole = quoted(text.slice(0, 30));
    if (whole.length <= 30) return whole;
    const short = quoted(text.slice(0, 13) + text.slice(-14));
    return short.slice(0, 13) + "..." + short.slice(-14);
  };

  class Options {
    constructor(text, at) {
      Object.assign(this, { text, at, open: 0 });
    }

    fail(expected, at = this.at) {
      throw Object.assign(new PatternError(expected), { expected, at });
    }

    take(wanted) {
      while (this.at < this.text.length && /\s/.test(this.text[this.at])) this.at += 1;
      if (typeof wanted === "string") {
        if (!this.text.startsWith(wanted, this.at)) return null;
        this.at += wanted.length;
        return wanted;
      }
      const match = matchAt(wanted, this.text, this.at);
      if (match === null) return null;
      this.at += match[0].length;
      return match[0];
    }

    need(wanted, expected) {
      const found = this.take(wanted);
      if (found === null) this.fail(expected);
      return found;
    }

    options() {
      this.need("(", "'('");
      const found = {};
      this.items(() => {
        const name = this.need(OPTION, "an option");
        if (Object.hasOwn(found, name)) this.fail(`the option ${name} once`, this.at - name.length);
        this.need("=", `'=' after the option ${name}`);
        found[name] = this.value(`a value of the option ${name}`);
      }, ")");
      return found;
    }

    items(item, end) {
      if (this.open === DEEPEST_VALUE) this.fail(`at most ${DEEPEST_VALUE} brackets within one another`);
      this.open += 1;
      while (this.take(end) === null) {
        item();
        if (this.take(",") === null) {
          this.need(end, `',' or '${end}'`);
          break;
        }
      }
      this.open -= 1;
    }

    value(expected) {
      let text = this.take(STRING);
      if (text !== null) return text.slice(1, -1);
      text = this.take(NUMBER);
      if (text !== null) return Number(text);
      text = this.take(WORD);
      if (text !== null) return Object.hasOwn(CONSTANTS, text) ? CONSTANTS[text] : text;
      if (this.take("[") !== null) {
        const found = [];
        this.items(() => found.push(this.value("a value")), "]");
        return found;
      }
      if (this.take("{") !== null) return this.mapping();
      return this.fail(expected);
    }

    mapping() {
      const found = {};
      this.items(() => {
        const text = this.take(STRING);
        const key = text === null ? this.need(WORD, "a key") : text.slice(1, -1);
        this.need(":", `':' after the key ${key}`);
        found[key] = this.value(`a value of the key ${key}`);
      }, "}");
      return found;
    }
  }

  class Parser {
    constructor(text) {
      Object.assign(this, { text, tokens: [], at: 0, open: 0 });
      const end = text.replace(/[ \t\n\r\f\v,]+$/, "").length;
      let at = 0;
      while (at < end) {
        const match = matchAt(TOKEN, text, at);
        if (match === null) {
          this.tokens.push([text.slice(at).replace(/^[ \t\n\r\f\v,]+/, "")[0], {}]);
          break;
        }
        this.tokens.push([match[0].replace(/[ \t\n\r\f\v,]/g, ""), {}]);
        at += match[0].length;
        if (match[2] && matchAt(BEGIN, text, at)) at = this.readOptions(at);
      }
    }

    readOptions(at) {
      const token = this.tokens[this.tokens.length - 1];
      const reader = new Options(this.text, at);
      try {
        token[1] = reader.options();
      } catch (error) {
        if (!(error instanceof PatternError)) throw error;
        const found = error.at < this.text.length ? quoted(this.text[error.at]) : "the end";
        const where = `found ${found} after ${shown(this.text.slice(0, error.at))}`;
        throw new PatternError(`pattern ${shown(this.text)}: options of ${token[0]}: expected ${error.expected}, ${where}`);
      }
      return reader.at;
    }

    peek() {
      return this.at < this.tokens.length ? this.tokens[this.at][0] : "";
    }

    fail(expected) {
      const found = this.peek() ? quoted(this.peek()) : "the end";
      throw new PatternError(`pattern ${shown(this.text)}: expected ${expected}, found ${found} after ${this.at} tokens`);
    }

    sequence() {
      let layers = this.item();
      while (this.peek() && this.peek() !== ")") {
        layers = layers.concat(this.item());
        if (layers.length > MOST) this.fail(`at most ${MOST} layers in all`);
      }
      return layers;
    }

    item() {
      let count = 1;
      if (this.peek().endsWith("*") && this.peek() !== "*") {
        const digits = this.peek().slice(0, -1);
        count = digits.length < 9 ? Number(digits) : MOST + 1;
        if (count < 1 || count > MOST) this.fail(`a count of 1 to ${MOST}`);
        this.at += 1;
      }
      const repeat = (layers) => Array.from({ length: count }, () => layers).flat();
      if (this.peek() !== "(") return repeat([this.layer()]);
      if (this.open === DEEPEST) this.fail(`at most ${DEEPEST} parentheses within one another`);
      this.at += 1;
      this.open += 1;
      const layers = this.sequence();
      if (this.peek() !== ")") this.fail("')'");
      this.at += 1;
      this.open -= 1;
      if (layers.length * count > MOST) this.fail(`at most ${MOST} layers in all`);
      return repeat(layers);
    }

    layer() {
      const mixers = [this.name("a mixer")];
      while (this.peek() === "+") {
        this.at += 1;
        mixers.push(this.name("a mixer after '+'"));
      }
      const layer = { mixers: mixers.map(([name, options]) => ({ name, options })), channel: null };
      if (this.peek() !== "/") return layer;
      this.at += 1;
      const [channel, options] = this.name("a channel mixer after '/'");
      if (channel === "none" && Object.keys(options).length) {
        throw new PatternError(`pattern ${shown(this.text)}: 'none' is no channel mixer and has no options`);
      }
      layer.channel = { name: channel, options };
      return layer;
    }

    name(expected) {
      if (!WHOLE_NAME.test(this.peek())) this.fail(expected);
      this.at += 1;
      return this.tokens[this.at - 1];
    }
  }

  // The layers that a pattern names, repetitions written out.
  function parsePattern(text) {
    const parser = new Parser(text);
    const layers = parser.sequence();
    if (parser.peek()) parser.fail("a mixer");
    return layers;
  }

  // The layers of a stack of that depth.
  function tilePattern(text, depth) {
    const layers = parsePattern(text);
    const size = layers.length;
    if (depth % size) {
      const nearest = Math.max(1, Math.floor(depth / size)) * size;
      throw new PatternError(
        `a depth of ${depth} does not fit the pattern of ${size} layers: use a multiple of ${size},` +
          ` such as ${nearest} or ${nearest + size}`,
      );
    }
    return Array.from({ length: depth / size }, () => layers).flat();
  }

  root.seqarch = Object.assign(root.seqarch || {}, { PatternError, SHARING, parsePattern, tilePattern });
})(globalThis);
