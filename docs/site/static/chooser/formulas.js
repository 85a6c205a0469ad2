// Numbers of whole models, from the formulas of chooser-formulas.js. Whole numbers are BigInt, as Python's are exact.
(function (root) {
  "use strict";

  class SettingError extends Error {}

  const floorDivide = (a, b) => {
    const quotient = a / b;
    return a % b !== 0n && a < 0n !== b < 0n ? quotient - 1n : quotient;
  };

  // A length of at least so many whose transform is fast: 1, 3/4 or 5/8 of a power of two.
  const fftLength = (least) => {
    const power = 1n << bits(least > 1n ? least - 1n : 0n);
    return [(5n * power) / 8n, (3n * power) / 4n, power].find((length) => length >= least);
  };
  const bits = (number) => (number ? BigInt(number.toString(2).length) : 0n);

  const OPERATIONS = {
    "+": (a, b) => a + b,
    "-": (a, b) => a - b,
    "*": (a, b) => a * b,
    "//": floorDivide,
    "<<": (a, b) => a << b,
    min: (a, b) => (a < b ? a : b),
    max: (a, b) => (a > b ? a : b),
    "==": (a, b) => a === b,
    "!=": (a, b) => a !== b,
    "<": (a, b) => a < b,
    "<=": (a, b) => a <= b,
    ">": (a, b) => a > b,
    ">=": (a, b) => a >= b,
    bits,
    fft_length: fftLength,
  };

  class Formulas {
    constructor(tables) {
      this.tables = tables;
      this.constants = new Map();
      this.transforms = new Map(Object.entries(tables.fft).map(([length, flops]) => [BigInt(length), BigInt(flops)]));
    }

    // One formula of a layer, at a width: { shape, constants } with the constants of that width.
    formula(kind, name, key, width) {
      const where = `${kind}/${name}/${key}/${width}`;
      if (!this.constants.has(where)) {
        const entry = this.tables[kind][name].formulas[key].find((each) => each.widths.includes(width));
        const place = entry.widths.indexOf(width);
        const unit = BigInt(width / this.tables.unit);
        const constants = entry.constants.map((column) =>
          column.values
            ? BigInt(column.values[place])
            : column.polynomial.reduceRight((sum, coefficient) => sum * unit + BigInt(coefficient), 0n),
        );
        this.constants.set(where, { shape: entry.shape, constants });
      }
      return this.constants.get(where);
    }

    value(kind, name, key, width, T = 0n, W = 0n) {
      const { shape, constants } = this.formula(kind, name, key, width);
      const variables = { T, W };
      const evaluate = (part) => {
        if (typeof part === "number") return constants[part];
        if (typeof part === "string") return variables[part];
        const [operation, ...parts] = part;
        if (operation === "if") return evaluate(evaluate(parts[0]) ? parts[1] : parts[2]);
        if (operation === "fft_flops") return this.transforms.get(evaluate(parts[0]));
        return OPERATIONS[operation](...parts.map(evaluate));
      };
      return evaluate(shape);
    }
  }

  // What every layer of a model is, checked: layers alike are counted once.
  function checkedLayers(formulas, pattern, settings) {
    const { tables } = formulas;
    const kinds = new Map();
    for (const layer of root.seqarch.tilePattern(pattern, settings.depth)) {
      const key = JSON.stringify(layer);
      if (!kinds.has(key)) kinds.set(key, { ...checkedLayer(tables, layer, settings), count: 0n });
      kinds.get(key).count += 1n;
    }
    return [...kinds.values()];
  }

  function checkedLayer(tables, layer, { width, channel }) {
    const mixers = layer.mixers.map(({ name, options }) => {
      checkName(tables.mixers, "mixer", name, width);
      return { name, window: checkedWindow(tables, name, options) };
    });
    const own = layer.channel || { name: channel, options: {} };
    if (own.name !== "none") checkName(tables.channels, "channel mixer", own.name, width);
    if (Object.keys(own.options).length) throw unknownOptions(own.name, Object.keys(own.options));
    return { mixers, channel: own.name };
  }

  function checkName(known, kind, name, width) {
    if (!Object.hasOwn(known, name)) {
      const hint = nearest(name, Object.keys(known));
      throw new SettingError(`${kind} '${name}' is unknown here${hint ? `; did you mean '${hint}'?` : "."}`);
    }
    const refused = known[name].refused[String(width)];
    if (refused) throw new SettingError(`${name} cannot have the width ${width}: ${refused}`);
  }

  function checkedWindow(tables, name, options) {
    const option = tables.windowed[name];
    const others = Object.keys(options).filter((each) => each !== option);
    if (others.length) throw unknownOptions(name, others, option);
    if (!option || !Object.hasOwn(options, option) || options[option] === null) return null;
    const window = options[option];
    if (!Number.isSafeInteger(window) || window < 1) {
      throw new SettingError(`${name}: ${option} is ${JSON.stringify(window)}, expected a whole number of at least 1`);
    }
    return BigInt(window);
  }

  const unknownOptions = (name, options, known) =>
    new SettingError(
      `${name}: this page counts with default options${known ? ` and ${known}=` : ""}, not with` +
        ` ${options.join(", ")}; LanguageModel in Python counts with all`,
    );

  // The known name that begins so, or the one with the fewest edits, where these are few.
  function nearest(name, known) {
    const edits = (a, b) => {
      let row = Array.from({ length: b.length + 1 }, (_, i) => i);
      for (let i = 1; i <= a.length; i += 1) {
        const next = [i];
        for (let j = 1; j <= b.length; j += 1) {
          next[j] = Math.min(next[j - 1] + 1, row[j] + 1, row[j - 1] + (a[i - 1] === b[j - 1] ? 0 : 1));
        }
        row = next;
      }
      return row[b.length];
    };
    const begun = known.find((each) => name.length > 2 && each.startsWith(name));
    if (begun) return begun;
    const best = known.map((each) => [edits(name, each), each]).sort((a, b) => a[0] - b[0])[0];
    return best && best[0] <= Math.max(2, name.length / 3) ? best[1] : null;
  }

  // A model: what does not depend on the length at once, the rest as functions of it.
  function model(formulas, pattern, settings) {
    const { width, dtype, vocabulary } = settings;
    const layers = checkedLayers(formulas, pattern, settings);
    const D = BigInt(width);
    const sum = (of) => layers.reduce((total, layer) => total + layer.count * of(layer), 0n);
    const ofMixers = (key, T) => (layer) =>
      layer.mixers.reduce((total, { name, window }) => {
        const wanted = window === null || key === "parameters" ? key : `${key}_windowed`;
        return total + formulas.value("mixers", name, wanted, width, T, window ?? 0n);
      }, 0n);
    const ofChannel = (key, T) => (layer) =>
      layer.channel === "none" ? 0n : formulas.value("channels", layer.channel, key, width, T);
    const parameters = (key) =>
      sum((layer) => {
        const branches = BigInt(layer.mixers.length);
        const norms = layer.channel === "none" ? D : 2n * D;
        return ofMixers("parameters")(layer) + ofChannel(key)(layer) + norms + (branches > 1n ? branches * D : 0n);
      }) + D;
    const table = BigInt(vocabulary) * D;
    return {
      layers,
      parameters: parameters("parameters") + 2n * table,
      read: parameters("active") + table, // of weights for one token: the head whole, of the embedding next to nothing
      flops: (T) => sum(ofMixers("flops", T)) + sum(ofChannel("flops", T)) + 2n * table * T,
      stepFlops: (T) => sum(ofMixers("step_flops", T)) + sum(ofChannel("flops", 1n)) + 2n * table,
      stateBytes: (T) => sum(ofMixers(`state_${dtype}`, T)),
      stateRead: (T) =>
        sum((layer) =>
          ofMixers(`state_${dtype}`, T)({ mixers: layer.mixers.filter(({ name }) => !formulas.tables.partial.includes(name)) }),
        ),
    };
  }

  root.seqarch = Object.assign(root.seqarch || {}, { Formulas, SettingError, model });
})(globalThis);
