"""What is said at the end of a run."""

from collections import Counter

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say of each reason for skipping once how many tests it has cost; it names the package that would help."""
    skipped = [report.longrepr for report in terminalreporter.stats.get("skipped", [])]
    for reason, count in sorted(Counter(reason for _, _, reason in skipped).items()):
        terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")
