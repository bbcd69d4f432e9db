"""``report``: tables and pictures of what ``evaluate`` stored."""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Report:
    """Tables and pictures of evaluated runs, grouped by method."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of runs, each with what evaluate stored."""
    out: Path = Path("runs/report")
    """Where report.md, the numbers as JSON and the pictures go."""
    json: bool = False
    """Print the results as JSON instead of tables, and write nothing."""

    def check(self) -> None:
        """Nothing is checked: errors show when the runs are read."""

    def execute(self) -> None:
        """Prints the tables and writes the report; it needs no jax."""
        from experiments.reports.report import gather, print_report, write_report
        from experiments.runs.metrics import make_console

        sections = gather(self.runs)
        if self.json:
            results = {name: results for name, results, _ in sections}
            print(json.dumps(results, indent=2))
            return
        console = make_console()
        print_report(sections, console)
        for file in write_report(sections, self.out):
            console.print(str(file), soft_wrap=True)
