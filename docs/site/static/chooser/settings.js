// The settings of the chooser: read from the form, checked one by one, kept in the fragment of the address.
(function (root) {
  "use strict";

  const { SettingError } = root.seqarch;

  // Nominal memory bandwidths and arithmetic in float32, from data sheets, but for the first, which is measured.
  const DEVICES = {
    bench: ["two server cores (measured here)", null, null, "What the bench of this repository measured on two cores."],
    board: ["edge: Raspberry Pi 5", 17.1, 153, "LPDDR4X-4267, 32 bits; four Cortex-A76 at 2.4 GHz with two FMAs of four numbers each: data sheets, not measured."],
    laptop: ["laptop: DDR5-5600, 8 cores", 89.6, 896, "Two channels of DDR5-5600; eight cores of 3.5 GHz with two FMAs of eight numbers each: by the data sheets, not measured."],
    desktop: ["desktop GPU: RTX 4090", 1008, 82600, "GDDR6X and float32 arithmetic by the data sheet, not measured."],
    server: ["server GPU: H200", 4800, 67000, "HBM3e and float32 arithmetic by the data sheet, not measured."],
    own: ["one's own: see More", null, null, "Memory reads and arithmetic as given under More."],
  };

  const DEFAULTS = {
    pattern: "3*gated_delta_net attention",
    length: "32768",
    width: "768",
    depth: "12",
    memory: "100 MB",
    counted: "state",
    device: "board",
    dtype: "float32",
    channel: "swiglu",
    vocabulary: "50304",
    bandwidth: "17.1",
    arithmetic: "153",
    shown: "state",
    fitting: "",
  };

  const UNITS = { B: 1, kB: 1e3, KB: 1e3, MB: 1e6, GB: 1e9, TB: 1e12, KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30, TiB: 2 ** 40 };

  function wholeNumber(name, text, least, most) {
    const plain = text.replaceAll(/[\s,_]/g, "");
    if (!/^[+-]?\d+$/.test(plain)) throw new SettingError(`${name} is '${text}', expected a whole number`);
    const number = BigInt(plain);
    if (number < BigInt(least) || number > BigInt(most)) {
      const said = (value) => BigInt(value).toLocaleString("en");
      throw new SettingError(`${name} is ${said(number)}, expected ${said(least)} to ${said(most)}`);
    }
    return number;
  }

  function positive(name, text) {
    const number = Number(text.replaceAll(/[\s,_]/g, ""));
    if (!text.trim() || !Number.isFinite(number) || number <= 0) {
      throw new SettingError(`${name}: '${text}' was given, expected a number above 0`);
    }
    return number;
  }

  function bytes(text) {
    const match = /^\s*([\d.,_ ]*\d)\s*([A-Za-z]*)\s*$/.exec(text);
    const unit = match && (match[2] || "B");
    const number = match ? Number(match[1].replaceAll(/[\s,_]/g, "")) : NaN;
    if (!match || !Object.hasOwn(UNITS, unit) || !(number > 0)) {
      throw new SettingError(`memory is '${text}', expected a size such as 100 MB, 64 MiB or 8 GB`);
    }
    return number * UNITS[unit];
  }

  // How each field is read; what has no entry is text.
  const readers = (tables) => ({
    length: (text) => wholeNumber("length", text, 1, tables.longest),
    depth: (text) => Number(wholeNumber("depth", text, 1, 10000)),
    vocabulary: (text) => Number(wholeNumber("vocabulary", text, 1, 2 ** 31 - 1)),
    width: (text) => {
      if (!tables.widths.includes(Number(text))) {
        throw new SettingError(`width is '${text}', expected one of ${tables.widths[0]} to ${tables.widths.at(-1)} that is listed`);
      }
      return Number(text);
    },
    memory: bytes,
    bandwidth: (text) => positive("memory reads", text),
    arithmetic: (text) => positive("arithmetic", text),
  });

  // Settings as text from the fragment `#length=...&pattern=...`; unknown names are left out.
  function fromFragment(fragment) {
    const given = new URLSearchParams(fragment.replace(/^#/, ""));
    return Object.fromEntries(Object.entries(DEFAULTS).map(([name, value]) => [name, given.get(name) ?? value]));
  }

  // The fragment that restores settings: those that are not at their defaults.
  function toFragment(texts) {
    const changed = Object.entries(texts).filter(([name, value]) => value !== DEFAULTS[name]);
    return changed.length ? `#${new URLSearchParams(changed)}` : "";
  }

  root.seqarch = Object.assign(root.seqarch, { DEVICES, DEFAULTS, readers, fromFragment, toFragment });
})(globalThis);
