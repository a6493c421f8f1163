"""Progress bars, as a terminal of 80 columns shows them."""

import re
import sys

import pytest

pytest.importorskip("ml_collections", reason='needs the extra: pip install -e ".[test]"')

from common.training import progress
from run_support import ROOT, command, in_terminal

FIGURES = r"top-1 [\d.]+%, CFS \d\.\de[+-]\d\d"


def test_a_small_run_shows_its_figures(environment, tmp_path):
    short = {
        "epochs": 3,
        "pretrain_epochs": 2,
        "steps_per_epoch": 5,
        "patience": 1,
        "constraint": "one_bit_shift",
    }
    flags = [f"--config.{field}={value}" for field, value in short.items()]
    digits = [
        sys.executable,
        str(ROOT / "experiments" / "digits.py"),
        f"--workdir={tmp_path}",
        *flags,
    ]
    _, lines = in_terminal(digits, environment)
    full_precision, ste, cbp = (
        next(line for line in lines if name in line) for name in ("full precision", "STE", "CBP")
    )
    assert re.search(r"100%\|.+\| .*, loss \d\.\d+, top-1 [\d.]+%$", full_precision)
    assert re.search(rf"^one_bit_shift STE +100%\|.+\| .*, {FIGURES}$", ste)  # it has no window
    assert re.search(rf"^one_bit_shift CBP +100%\|.+\| .*, {FIGURES}, g 3$", cbp)
    assert max(map(len, (full_precision, ste, cbp))) <= 80


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"constraint": "two_bit_shift"}, rf"^two_bit_shift +100%\|.+\|.*img/s, {FIGURES}, g 1$"),
        ({"method": "ste"}, rf"^binary +100%\|.+\|.*img/s, {FIGURES}$"),
    ],
    ids=["cbp", "ste"],
)
def test_a_long_run_shows_its_figures(photos, environment, tmp_path, changes, shown):
    _, lines = in_terminal(
        command(photos, tmp_path, epochs=1, preflight=False, **changes), environment
    )
    bar = next(line for line in lines if "100%" in line)
    assert re.search(shown, bar), bar
    assert len(bar) <= 80


def test_the_longest_figures_fit():
    """Days to go, the longest of names, and a window that grew by a factor."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'experiments')!r})\n"
        "from common.training import progress\n"
        "def show(bar, seconds):\n"
        "    bar.start_t -= seconds\n"
        "    bar.update(bar.total // 10)\n"
        "    bar.set_postfix_str(progress.figures({'top1': 0.75, 'cfs': 1.23e-4, 'window': 3e9}, with_window=True))\n"
        "    bar.close()\n"
        "show(progress.images(10**9, 0, 'two_bit_shift', True), 10**5)\n"
        "show(progress.epochs(10**6, 'one_bit_shift CBP'), 10**4)\n"
    )
    _, lines = in_terminal([sys.executable, "-c", code])
    for line, remaining in zip(lines, ("<250:00:00", "<25:00:00"), strict=False):
        assert re.search(
            rf" 10%\|.+\|.*{remaining}.*, top-1 75\.00%, CFS 1\.2e-04, g 3e\+09$", line
        ), line
        assert len(line) <= 80


@pytest.mark.parametrize(
    ("window", "with_window", "end"),
    [(7.0, True, ", g 7"), (9999.0, True, ", g 9999"), (7.0, False, ""), (float("inf"), True, "")],
)
def test_the_window_is_shown_where_one_closes(window, with_window, end):
    row = {"loss": 0.5, "top1": 0.25, "cfs": 0.01, "window": window}
    assert progress.figures(row, with_window) == "top-1 25.00%, CFS 1.0e-02" + end


def test_full_precision_has_a_loss_and_no_constraint():
    assert (
        progress.figures({"loss": 0.5, "top1": 0.25}, with_window=True)
        == "loss 0.500, top-1 25.00%"
    )
