"""Tables in Markdown."""

from collections.abc import Sequence

from common.report.workdir import METHODS, Summary, size_text


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns an aligned Markdown table."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in lines
    )


def results_table(summaries: Sequence[Summary]) -> str:
    """Returns one row per run: accuracies, whether the constraint is met, and what it saves."""
    columns: dict[str, list[str]] = {
        "constraint": [s.constraint for s in summaries],
        "method": [METHODS.get(s.method, "") for s in summaries],
        "teacher": ["yes" if s.distilled else "" for s in summaries],
        "top-1 before": [f"{s.full_precision_top1:.2%}" for s in summaries],
        "top-1": [f"{s.top1:.2%}" for s in summaries],
        "test top-1 before": [_share(s.full_precision_test_top1) for s in summaries],
        "test top-1": [_share(s.test_top1) for s in summaries],
        "loss": ["" if s.eval_loss is None else f"{s.eval_loss:.3f}" for s in summaries],
        "CFS": [f"{s.cfs:.1e}" if s.constrained else "" for s in summaries],
        "CFS / scale": [f"{s.cfs_relative:.1e}" if s.constrained else "" for s in summaries],
        "bits per weight": [str(s.bits_per_weight) for s in summaries],
        "size": [f"{size_text(s.bytes_packed)} of {size_text(s.bytes_float32)}" for s in summaries],
        "packed file": ["" if s.bytes_file is None else size_text(s.bytes_file) for s in summaries],
        "top-1 from file": [_share(s.file_top1) for s in summaries],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    return format_table(tuple(columns), list(zip(*columns.values(), strict=True)))


def _share(accuracy: float | None) -> str:
    return "" if accuracy is None else f"{accuracy:.2%}"
