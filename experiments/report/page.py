"""The report as a page, ``index.md``: its plots, its tables, how to read them, and how the runs were made."""

from __future__ import annotations

from pathlib import Path

from experiments.report.comparison import TUNED, Comparison, Setting, listed
from experiments.report.figures import bytes_text, test_of
from experiments.report.lm_eval_table import lm_eval_table
from experiments.report.starts import start_text
from experiments.util.blocks import table
from experiments.util.files import write_atomic


def table_rows(comparison: Comparison) -> list[list[str]]:
    """The table of a comparison, its header first."""
    metric, length = comparison.sample["metric"], comparison.sample["model"]["state_length"]
    header = [
        "Model",
        f"{metric['label']}, median (min to max)",
        "Seeds",
        "Parameters",
        "Training FLOPs",
        f"State at {length:,}",
        "Tokens/s",
        *(TUNED[name].capitalize() for name in tuned_paths(comparison)),
    ]
    return [header, *(_row(setting, comparison) for setting in comparison.settings)]


def tuned_paths(comparison: Comparison) -> list[str]:
    """The paths of the tuned options in a table: the learning rate, and others of which several values were tried."""
    return [name for name in TUNED if name == "train.lr" or name in comparison.grids]


def _row(setting: Setting, comparison: Comparison) -> list[str]:
    seeds, chosen = len(comparison.seeds), [_tuned(setting, name) for name in tuned_paths(comparison)]
    if not setting.finished:
        return [setting.label, "none finished", f"0 of {seeds}", "", "", "", "", *chosen]
    record, values = setting.finished[0].record, setting.values(test_of)
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    failed = sum(run.recorded_status in ("failed", "finished") and not run.finished for run in setting.runs)
    return [
        setting.label,
        f"{setting.median(test_of):.3f}{spread}",
        f"{len(values)} of {seeds}" + (f", {failed} failed" if failed else ""),
        f"{record['model']['parameters']:,}",
        f"{setting.median(lambda run: run.record['cost']['flops']):.1e}".replace("e+", "e"),
        bytes_text(record["model"]["state_bytes"]),
        f"{setting.median(lambda run: run.record['cost']['tokens_per_second']):,.0f}",
        *chosen,
    ]


def _tuned(setting: Setting, name: str) -> str:
    tried, value = setting.grid[name], f"{setting.tuned(name):g}"
    return value if len(tried) < 2 else f"{value} (of {listed(tried)})"


def write_page(
    path: Path,
    root: Path,
    comparisons: list[Comparison],
    plots: dict[str, list[tuple[str, str]]],
    problems: list[str],
) -> None:
    parts = ["# " + " and ".join(dict.fromkeys(c.title for c in comparisons if c.shown))]
    if len(plots) > 1:
        parts.append("![All comparisons at a glance](overview.png)")
    for comparison in comparisons:
        parts += _section(comparison, plots.get(comparison.name, []), len(comparisons) > 1)
    if problems:
        parts += ["## Folders that could not be read", "\n".join(f"- {problem}" for problem in problems)]
    parts += _machine(comparisons)
    parts += ["## Drawn again", f"```\npython -m experiments.report {root}\n```"]
    parts.append(
        "One line per run: [results.csv](results.csv). All runs, filtered and plotted by other axes:"
        " [explorer.html](explorer.html), which opens in any browser without a network."
    )
    write_atomic(path, "\n\n".join(parts) + "\n")


def _section(comparison: Comparison, plots: list[tuple[str, str]], titled: bool) -> list[str]:
    if not comparison.shown:
        return [f"## {comparison.name}", "No run is finished yet.", *_remarks(comparison)]
    sample, metric = comparison.sample, comparison.sample["metric"]
    parts = [f"## {comparison.title} (`{comparison.name}`)"] if titled else []
    parts.append(sample["task"]["reading"])
    parts += [f"![{comparison.title}: {shows}]({name}.png)" for name, shows in plots[:1]]
    header, *rows = table_rows(comparison)
    parts.append(table(header, rows, align="---:"))
    better = "More" if metric["higher_is_better"] else "Less"
    seeds = ", ".join(map(str, comparison.seeds))
    parts.append(
        f"{better} is better; chance is {metric['chance']:.3g} ({metric['chance_label']}). Seeds: {seeds}. Every run"
        f" was tested once, with {_tested(comparison)}; {_chosen(comparison)}. Training FLOPs and tokens per second are"
        " medians over seeds; tokens per second are by the clock, on the machine as it was, with whatever else ran"
        f" there. FLOPs are {sample['cost']['flops_formula']}. {_starts(comparison)}"
    )
    parts += _remarks(comparison)
    if scores := lm_eval_table(comparison):
        parts += ["On tasks of the lm-evaluation-harness, by `seqarch lm-eval`, the median over seeds:", scores]
    parts += [f"![{comparison.title}: {shows}]({name}.png)" for name, shows in plots[1:]]
    data = {key: value for key, value in sample["data"].items() if key != "task"}
    parts.append("Data: " + "; ".join(f"{key} {value}" for key, value in data.items() if key != "hash") + ".")
    hashes = sorted({run.record["data"]["hash"] for setting in comparison.shown for run in setting.finished})
    parts.append("Data manifest: " + ", ".join(f"`{value}`" for value in hashes) + ".")
    if len(hashes) > 1:
        parts.append("**These runs were evaluated on different data and cannot be compared.**")
    commands = dict.fromkeys(run.record["command"] for setting in comparison.shown for run in setting.finished)
    parts.append("Run by:\n\n```\n" + "\n".join(commands) + "\n```")
    return parts


def _tested(comparison: Comparison) -> str:
    """The checkpoint that was tested, in words."""
    chosen = "the checkpoint that validation chose"
    last = [
        v.label for v in comparison.shown if any(r.config["train"].get("eval_checkpoint") == "last" for r in v.finished)
    ]
    if not last:
        return chosen
    if len(last) == len(comparison.shown):
        return "its last checkpoint"
    return f"{chosen}, or its last checkpoint ({', '.join(last)})"


def _starts(comparison: Comparison) -> str:
    """How the models began, by their labels where they differ."""
    starts: dict[str, list[str]] = {}
    for setting in comparison.shown:
        starts.setdefault(start_text(setting.finished[0].config["model"]), []).append(setting.label)
    if len(starts) == 1:
        return f"All models began with {next(iter(starts))}."
    return "Models began with " + "; ".join(f"{start} ({', '.join(labels)})" for start, labels in starts.items()) + "."


def _chosen(comparison: Comparison) -> str:
    """Among which settings was chosen, and how."""
    if not comparison.grids:
        return "each model was run with one learning rate and one weight decay"
    grids = "; ".join(f"{TUNED[name]} {listed(values)}" for name, values in comparison.grids.items())
    return f"where a model was run with several settings, the median on validation chose among them ({grids})"


def _remarks(comparison: Comparison) -> list[str]:
    if not comparison.remarks:
        return []
    return ["Missing or failed:\n\n" + "\n".join(f"- {remark}" for remark in comparison.remarks)]


def _machine(comparisons: list[Comparison]) -> list[str]:
    lines = []
    for comparison in comparisons:
        for run in [run for setting in comparison.shown for run in setting.finished]:
            hardware, software = run.record["hardware"], run.record["environment"]
            line = f"{run.device}, {hardware['cores']} cores, {hardware['threads']} threads per run"
            line += f"; Python {software['python']}, torch {software['packages']['torch']}"
            lines.append(f"- {line}; code {run.commit}")
    return ["## Machine", "\n".join(dict.fromkeys(lines))] if lines else []
