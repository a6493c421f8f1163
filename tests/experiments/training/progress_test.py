"""Progress bars, as a terminal of 80 columns shows them."""

import re
import sys

import pytest

pytest.importorskip("ml_collections", reason='needs the extra: pip install -e ".[test]"')

from common.training import progress
from run_support import ROOT, digits_config, in_terminal, study_command

FIGURES = r"top-1 [\d.]+%, CFS \d\.\de[+-]\d\d"


def test_the_bars_of_a_study(environment, tmp_path):
    """In full precision, by STE, which has no window, and by CBP; what is printed keeps out."""
    arguments = study_command(tmp_path, constraint="two_bit_shift", epochs=3)
    _, lines = in_terminal(arguments, environment)
    full_precision, ste, cbp = lines[:3]
    assert re.search(r"^full precision 100%\|.+\|.*, loss \d\.\d+, top-1 [\d.]+%$", full_precision)
    assert re.search(rf"^two_bit_shift STE 100%\|.+\|.*img/s, {FIGURES}$", ste)
    assert re.search(rf"^two_bit_shift 100%\|.+\|.*img/s, {FIGURES}, g 3$", cbp)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("method", ["cbp", "ste", "no_window", "binary_relax"])
def test_the_longest_figures_fit(method):
    """Days to go, the longest of names, and a window that grew by a factor."""
    config = digits_config(constraint="two_bit_shift", method=method)
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'experiments')!r})\n"
        "from common.training import progress\n"
        f"bar = progress.images(10**9, 0, {progress.description(config)!r}, True)\n"
        "bar.start_t -= 10**5\n"
        "bar.update(10**8)\n"
        "row = {'top1': 0.75, 'cfs': 1.23e-4, 'window': 3e9}\n"
        f"bar.set_postfix_str(progress.figures(row, with_window={method == 'cbp'}))\n"
        "bar.close()\n"
    )
    _, (line, *_) = in_terminal([sys.executable, "-c", code])
    window = r", g 3e\+09" if method == "cbp" else ""
    end = rf"<250:00:00, .*img/s, top-1 75\.00%, CFS 1\.2e-04{window}$"
    assert re.search(rf" 10%\|.+\|{end}", line), line
    assert len(line) <= 80


@pytest.mark.parametrize(
    ("window", "with_window", "end"),
    [(7.0, True, ", g 7"), (9999.0, True, ", g 9999"), (7.0, False, ""), (float("inf"), True, "")],
)
def test_the_window_is_shown_where_one_closes(window, with_window, end):
    row = {"loss": 0.5, "top1": 0.25, "cfs": 0.01, "window": window}
    assert progress.figures(row, with_window) == "top-1 25.00%, CFS 1.0e-02" + end


def test_full_precision_has_a_loss_and_no_constraint():
    row = {"loss": 0.5, "top1": 0.25}
    assert progress.figures(row, with_window=True) == "loss 0.500, top-1 25.00%"
