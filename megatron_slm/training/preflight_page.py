"""The page that the preflight ends with: on the terminal, and as text in the run folder."""

from pathlib import Path

from megatron_slm.files.atomic import write_text_atomically
from megatron_slm.training.preflight import (
    BAD_DATA,
    BAD_SETTINGS,
    FINE,
    WARNING,
    Finding,
    PreflightFailed,
    raise_if_fatal,
)

PAGE_FILE = "preflight.txt"
STATES = {FINE: "ok", WARNING: "warning", BAD_SETTINGS: "REFUSED", BAD_DATA: "REFUSED"}


def write_page(findings: list[Finding], folder: Path) -> list[Finding]:
    """The page as text in the run folder; a disk that cannot take it costs a warning."""
    lines = [
        f"{STATES[finding.state]:<9} {finding.check:<20} {finding.sentence}" for finding in findings
    ]
    try:
        write_text_atomically(folder / PAGE_FILE, "\n".join(lines) + "\n")
    except OSError as error:
        return [Finding("page", WARNING, f"{folder / PAGE_FILE} could not be written ({error})")]
    return []


def report(findings: list[Finding], rank: int) -> int:
    """Show the page, on rank 0; returns the exit code of --preflight: 0, 2 or 3."""
    verdict = "this job can start"
    exit_code = 0
    try:
        raise_if_fatal(findings)
    except PreflightFailed as failure:
        verdict = "this job cannot start as it is"
        exit_code = failure.exit_code
    if rank == 0:
        show_page(findings)
        warnings = sum(finding.state == WARNING for finding in findings)
        print(f"{verdict}; {warnings} warning{'s' * (warnings != 1)}")
    return exit_code


def show_page(findings: list[Finding]) -> None:
    """The page on the terminal, or in a log."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {FINE: "green", WARNING: "yellow"}
    table = Table(title="Preflight", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("state", "check"):
        table.add_column(name, no_wrap=True)
    table.add_column("what was found", overflow="fold")
    for finding in findings:
        state = Text(STATES[finding.state], styles.get(finding.state, "bold red"))
        table.add_row(state, finding.check, Text(finding.sentence))
    Console(highlight=False).print(table)
