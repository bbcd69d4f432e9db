"""Evaluated runs side by side: tables in Markdown, pictures, the paper's figures."""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from experiments.compression import targets
from experiments.config import OptimizerConfig, RunConfig
from experiments.errors import ConfigError, RunError
from experiments.evaluation.results import (
    Results,
    cell,
    in_order,
    kinds,
    load_results,
    metric,
    missing_seeds,
    save_results,
    summarize,
)
from experiments.reports import paper
from experiments.reports.display import accuracy_table, markdown_table, plot_accuracy
from experiments.runs.directory import (
    compressed_to,
    evaluate_command,
    load_config,
    read_status,
    reading,
    write_text,
)
from experiments.runs.stored_config import differences, from_dict, to_dict

SCOPES: dict[targets.Scope, str] = {
    "global": "",
    "layer": "-uniform",
    "blocks": "-blocks",
    "channels": "-channels",
}


class Section(NamedTuple):
    """Runs with one network that are evaluated on the same examples.

    Attributes:
      name: of the data set and the network.
      results: the runs, by the label of their method.
      configs: one configuration for each method, with the seed of its first run.
    """

    name: str
    results: Results
    configs: dict[str, RunConfig]

    @property
    def examples(self) -> dict[str, Any]:
        """What decides which examples its runs are evaluated on."""
        return next(iter(self.configs.values())).evaluated_on


def gather(runs: Sequence[Path]) -> list[Section]:
    """Reads what ``evaluate`` stored, and groups runs of one kind.

    Args:
      runs: their directories. Runs that differ in nothing but the seed, and that of the
        runs that they start or learn from, are runs of one method.

    Returns:
      A section for all runs with one network on the same examples, in the order of the
      runs.

    Raises:
      RunError: a directory is not a run, was not evaluated as it is, or is given twice.
    """
    if not runs:
        raise RunError("report needs the directory of at least one run")
    sections: dict[object, Section] = {}
    labels: dict[object, str] = {}
    for run in runs:
        config = load_config(run)
        stored = _stored(run, config)
        key = (*config.evaluated_on.items(), config.model)
        if key not in sections:
            name = f"{config.data.name}-{config.model.title}"
            same = sum(other.name.startswith(name) for other in sections.values())
            name += f"-{same + 1}" if same else ""
            empty: Results = {"targets": [], "methods": {}}
            sections[key] = Section(name, stored | empty, {})
        _add(sections[key], run, config, stored, labels)
    return list(sections.values())


def method_label(config: OptimizerConfig) -> str:
    """The method as the paper calls it: ``CrAM+-k95``, ``CrAM+-Multi``, ``SAM``."""
    names = {"cram": "CrAM", "cram_plus": "CrAM+", "topk_plus": "Top-K+"}
    if config.rule not in names:
        return {"adam": "Adam"}.get(config.rule_name, config.rule_name.upper())
    if len(config.train_targets) == 1:
        suffix = config.train_targets[0]
    else:
        suffix = "N:M" if all(":" in t for t in config.train_targets) else "Multi"
    return f"{names[config.rule]}-{suffix}"


def print_report(sections: Sequence[Section], console: Console) -> None:
    """Prints the table of every section."""
    for section in sections:
        title = f"{_title(section, sections)}, {metric(section.results)} (%)"
        console.print(accuracy_table(section.results, title))


def _title(section: Section, sections: Sequence[Section]) -> str:
    """Its name, and what sets its examples apart from those of other sections."""
    own = section.examples
    others = [s.examples for s in sections if s.examples["name"] == own["name"]]
    apart = [f"{n} {v}" for n, v in own.items() if any(o[n] != v for o in others)]
    return section.name + (f" ({', '.join(apart)})" if apart else "")


def write_report(sections: Sequence[Section], out: Path) -> list[Path]:
    """Writes report.md, and the numbers and pictures of every section.

    Args:
      sections: from `gather`.
      out: the directory; files of an earlier report are replaced.

    Returns:
      The files.
    """
    files = [out / "report.md"]
    text = []
    for section in sections:
        name, results, configs = section
        title = _title(section, sections)
        save_results(results, out / f"{name}.json")
        files.append(out / f"{name}.json")
        text += [f"# {title}", "", *_runs(results, configs), ""]
        text += [*_accuracies(results), "", *_differences(results, configs)]
        for scope, words in SCOPES.items():
            shares = [targets.sparsity(t, scope) for t in results["targets"]]
            if sum(bool(share) for share in shares) < 2:
                continue
            path = out / f"{name}{words}.png"
            caption = f"{title}{words}, {metric(results)} (%)"
            plot_accuracy(results, path, caption, scope)
            text += [f"![Accuracy over sparsity]({path.name})", ""]
            files.append(path)
    write_text(files[0], "\n".join(text))
    return files


UNTRAINED = {"eval_targets", "checkpoint_every", "log_every"}
"""What can change in a configuration while the model stays."""


def _stored(run: Path, config: RunConfig) -> Results:
    path = run / "evaluation.json"
    if not path.exists():
        raise RunError(
            f"{run} was not evaluated; do it with\n  {evaluate_command(run)}"
        )
    results = load_results(path)
    (entry,) = _entries(results)
    with reading(path):
        evaluated = from_dict(entry["config"]) if "config" in entry else config
    then = differences(evaluated, config)
    steps = {entry.get("step"), read_status(run).get("step")} - {None}
    if len(steps) > 1:  # either is missing in results that were stored elsewhere
        then["step"] = entry["step"]
    if changed := [f"{n} {value}" for n, value in then.items() if n not in UNTRAINED]:
        raise RunError(
            f"{run} was evaluated at {', '.join(changed)} and has changed since; do it "
            f"again with\n  {evaluate_command(run)}"
        )
    return results


def _entries(results: Results) -> list[dict[str, Any]]:
    return [run for method in results["methods"].values() for run in method["runs"]]


def _add(
    section: Section,
    run: Path,
    config: RunConfig,
    stored: Results,
    labels: dict[object, str],
) -> None:
    results = section.results
    results["targets"] = in_order(results["targets"], stored["targets"])
    (entry,) = _entries(stored)
    short = method_label(config.optimizer) + _made(compressed_to(run))
    method = (section.name, short, _but_for_seed(config))
    if method not in labels:
        labels[method] = _label(section, config, short)
    label = labels[method]
    section.configs.setdefault(label, config)
    others = results["methods"].setdefault(label, {"runs": []})["runs"]
    if any(other["seed"] == config.seed for other in others):
        raise RunError(f"{run}: there are two runs of {label} with seed {config.seed}")
    for other in others:
        _check_settings(run, entry, other)
    others.append(entry | {key: stored[key] for key in ("versions", "machine")})


def _check_settings(run: Path, entry: dict[str, Any], other: dict[str, Any]) -> None:
    """Raises if a mean would be over targets that were pruned in different ways."""
    settings, others = (e.get("settings", {}) for e in (entry, other))
    for target in settings.keys() & others.keys():
        if settings[target] != others[target]:
            raise RunError(
                f"{run}: {target} was evaluated with {_words(settings[target])}, that "
                f"of seed {other['seed']} with {_words(others[target])}; evaluate one "
                f"of them again"
            )


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _label(section: Section, config: RunConfig, short: str) -> str:
    """A new method's label; if others have it too, with what tells them apart."""
    label, words = short, []
    while known := section.configs.get(label):
        changed = differences(_but_for_seed(config), _but_for_seed(known))
        changed |= {n: getattr(config, n) for n in ORIGINS if n in changed}
        if "name" in changed:
            changed = {config.name: ""}
        words += [f"{n.split('.')[-1]} {value}".strip() for n, value in changed.items()]
        label = f"{short} ({', '.join(words)})"
    return label


def _made(target: str) -> str:
    """What was done to a model, in words."""
    if not target:
        return ""
    try:
        return f", compressed to {targets.label(target)}"
    except ConfigError:  # such as what `allocate` stores
        return f", {target}"


ORIGINS = ("init_from", "teacher")


def _but_for_seed(config: RunConfig, seen: tuple[str, ...] = ()) -> RunConfig:
    """The configuration without its seed, and without those of what it comes from."""
    found: dict[str, Any] = {
        name: _origin(getattr(config, name), seen) for name in ORIGINS
    }
    rule = config.optimizer
    pruning = rule.pruning.used_by(rule.rule)
    optimizer = dataclasses.replace(rule, pruning=pruning)
    return dataclasses.replace(config, seed=0, optimizer=optimizer, **found)


def _origin(run: str | None, seen: tuple[str, ...]) -> str | None:
    """The same for all seeds of a run to start or learn from, if it is still there."""
    if not run or run in seen:  # a run may have replaced the one it comes from
        return run
    try:
        config = _but_for_seed(load_config(Path(run)), (*seen, run))
    except RunError:
        return run
    words = json.dumps([compressed_to(Path(run)), to_dict(config)])
    return hashlib.sha256(words.encode()).hexdigest()


def _runs(results: Results, configs: dict[str, RunConfig]) -> list[str]:
    rows = []
    for label, config in configs.items():
        runs = results["methods"][label]["runs"]
        draws = [d for run in runs for d in run.get("draws", {}).values()]
        drawn = ", ".join(map(str, sorted({*map(len, draws)} or {1})))
        seeds = ", ".join(str(run["seed"]) for run in runs)
        rows.append([label, config.name, str(config.epochs), seeds, drawn])
    header = ["method", "configuration", "epochs", "seeds", "calibrations"]
    return [*markdown_table(header, rows), "", *_machines(results)]


def _machines(results: Results) -> list[str]:
    """Where the runs were evaluated, and with what; which ones, if that differs."""
    runs_of: dict[str, list[str]] = {}
    for label, method in results["methods"].items():
        for run in method["runs"]:
            machine, versions = (
                ", ".join(f"{name} {value}" for name, value in run[key].items())
                for key in ("machine", "versions")
            )
            place = f"Evaluated on {machine}, with {versions}"
            runs_of.setdefault(place, []).append(f"{label} (seed {run['seed']})")
    if len(runs_of) == 1:
        return [f"{place}." for place in runs_of]
    return [f"- {place}: {', '.join(runs)}." for place, runs in runs_of.items()]


def _accuracies(results: Results) -> list[str]:
    header = [f"{metric(results)} (%)"]
    for method in results["methods"]:
        header += [f"{method}, {kind}" for kind in kinds(results)]
    columns = list(itertools.product(results["methods"], kinds(results)))
    rows = [
        [targets.label(target)] + [cell(results, *column, target) for column in columns]
        for target in results["targets"]
    ]
    deviation = (
        "± is the standard deviation over seeds; for one seed, over its calibrations."
    )
    if any(
        cell(results, *column, target) and missing_seeds(results, *column, target)
        for column in columns
        for target in results["targets"]
    ):
        deviation += " (1/3): of one of three seeds only."
    return [*markdown_table(header, rows), "", deviation, *_settings(results)]


def _settings(results: Results) -> list[str]:
    """How targets were pruned that need data; which methods, if that differs."""
    methods_of: dict[str, list[str]] = {}
    for method, entry in results["methods"].items():
        used: dict[str, Any] = {}
        for run in entry["runs"]:
            used |= run.get("settings", {})
        for target, values in used.items():
            words = f"{targets.label(target)}: {_words(values)}"
            methods_of.setdefault(words, []).append(method)
    every = len(results["methods"])
    lines = [
        f"- {words}" + f" ({', '.join(methods)})" * (len(methods) < every)
        for words, methods in methods_of.items()
    ]
    return ["", *lines] if lines else []


def _differences(results: Results, configs: dict[str, RunConfig]) -> list[str]:
    """Points above dense SGD, ours and the paper's; nothing without a run of SGD."""
    ours = summarize(results, "SGD", "pruned", "dense")[0] if "SGD" in configs else None
    if ours is None or math.isnan(ours):
        return []
    known = {
        method
        for method, config in configs.items()
        if any(paper.difference(config, t) is not None for t in results["targets"])
    }
    header = ["points above dense SGD"]
    for method in configs:
        header += [method, "the paper"] if method in known else [method]
    rows = []
    for target in results["targets"]:
        row = [targets.label(target)]
        for method, config in configs.items():
            # A dense network needs no recalibration.
            kind = "pruned" if target == "dense" else kinds(results)[-1]
            mean, _ = summarize(results, method, kind, target)
            note = missing_seeds(results, method, kind, target)
            row.append("" if math.isnan(mean) else f"{mean - ours:+.1f}{note}")
            published = paper.difference(config, target)
            if method in known:
                row.append("" if published is None else f"{published:+.1f}")
        rows.append(row)
    text = f"Dense SGD: {ours:.1f} %"
    published = paper.baseline(configs["SGD"])
    if published is not None:
        text += f"; the paper: {published:.1f} %, on the official images"
    return [*markdown_table(header, rows), "", f"{text}.", ""]
