// Runs the chooser's own scripts outside of a browser: reads { formulas, settings, patterns } and prints what they give,
// and with what the page begins.
"use strict";

const fs = require("node:fs");
const path = require("node:path");
const vm = require("node:vm");

const folder = path.join(__dirname, "..", "..", "docs", "site", "static", "chooser");
for (const name of ["pattern.js", "formulas.js", "settings.js"]) {
  vm.runInThisContext(fs.readFileSync(path.join(folder, name), "utf8"), name);
}
vm.runInThisContext(fs.readFileSync(path.join(__dirname, "chooser_numbers.js"), "utf8"));

const given = JSON.parse(fs.readFileSync(0, "utf8"));
const { seqarch } = globalThis;

function parsed(text) {
  try {
    return { layers: seqarch.parsePattern(text) };
  } catch (error) {
    if (!(error instanceof seqarch.PatternError)) throw error;
    return { error: error.message };
  }
}

const formulas = given.formulas ? new seqarch.Formulas(given.formulas) : null;
const settings = (given.settings || []).map((setting) => globalThis.chooserNumbers(formulas, setting));
const { DEFAULTS: defaults, DEVICES: devices } = seqarch;
const patterns = (given.patterns || []).map(parsed);
process.stdout.write(JSON.stringify({ settings, patterns, defaults, devices }));
