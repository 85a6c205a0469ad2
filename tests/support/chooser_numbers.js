// The chooser's numbers of one setting, as text; { error } where it refuses.
globalThis.chooserNumbers = function (formulas, setting) {
  "use strict";
  const { model, SettingError, PatternError } = globalThis.seqarch;
  try {
    const made = model(formulas, setting.pattern, setting);
    const length = BigInt(setting.length);
    const counts = { parameters: made.parameters };
    for (const name of ["flops", "stepFlops", "stateBytes"]) counts[name] = made[name](length);
    return Object.fromEntries(Object.entries(counts).map(([name, count]) => [name, String(count)]));
  } catch (error) {
    if (error instanceof SettingError || error instanceof PatternError) return { error: error.message };
    throw error;
  }
};
