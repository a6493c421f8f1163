"""The figures of a run, read back from matplotlib's objects, and the files."""

import numpy as np
import pytest

pytest.importorskip("ml_collections", reason='needs the extra: pip install -e ".[test]"')
pytest.importorskip("matplotlib", reason='needs the extra: pip install -e ".[test]"')

from common.report import figures


@pytest.fixture
def drawn(monkeypatch):
    """The saved figures, which stay readable after they are closed."""
    found, save = [], figures.save

    def record(figure, path):
        found.append(figure)
        save(figure, path)

    monkeypatch.setattr(figures, "save", record)
    return found


def rows(top1, cfs=None, window=None):
    count = len(top1)
    cfs, window = cfs or [0.5] * count, window or [2.0] * count
    return [
        {"epoch": epoch, "top1": a, "cfs_relative": c, "window": g}
        for epoch, a, c, g in zip(range(1, count + 1), top1, cfs, window, strict=True)
    ]


def lines_with(axes, xs):
    return [
        line
        for line in axes.get_lines()
        if len(line.get_xdata()) == len(xs) and np.allclose(line.get_xdata(), xs)
    ]


def test_png_and_pdf(tmp_path):
    folder, snapshots = tmp_path / "figures", {"before": np.linspace(-2, 2, 99)}
    cbp, ste = rows([0.8, 0.9]), rows([0.7, 0.9])
    figures.plot_training(folder / "training.png", "title", {"ste": ste, "cbp": cbp}, 0.95)
    figures.plot_weights(folder / "weights.png", "title", snapshots, (-1, 1))
    for stem in ("training", "weights"):
        assert (folder / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / f"{stem}.pdf").read_bytes().startswith(b"%PDF")


def test_single_epoch_is_visible(drawn, tmp_path):
    figures.plot_training(tmp_path / "f" / "t.png", "title", {"cbp": rows([0.8])}, 0.95)
    top, bottom, right = drawn[0].axes
    for axes in (top, bottom, right):
        (line,) = lines_with(axes, [1])
        assert line.get_marker() == "o"
        low, high = axes.get_ylim()
        assert low < line.get_ydata()[0] < high


def test_marks_what_the_axis_cuts_off(drawn, tmp_path):
    accuracies = [0.1, 0.2, *np.linspace(0.9, 0.92, 30)]
    figures.plot_training(tmp_path / "f" / "t.png", "title", {"cbp": rows(accuracies)}, 0.95)
    top = drawn[0].axes[0]
    (marks,) = lines_with(top, [1, 2])
    assert marks.get_marker() == "v"
    np.testing.assert_allclose(marks.get_ydata(), top.get_ylim()[0])
    assert "below the axis" in [text.get_text() for text in drawn[0].legends[0].get_texts()]
    figures.plot_training(tmp_path / "f" / "t.png", "title", {"cbp": rows([0.9, 0.91, 0.92])}, 0.95)
    assert "below the axis" not in [text.get_text() for text in drawn[1].legends[0].get_texts()]


def test_run_without_window_has_no_axis_for_it(drawn, tmp_path):
    figures.plot_training(tmp_path / "f" / "t.png", "title", {"ste": rows([0.8, 0.9])}, 0.95)
    assert len(drawn[0].axes) == 2


def test_what_a_method_does_not_have_leaves_a_gap(drawn, tmp_path):
    """No window under STE, and no CFS either in full precision."""
    ste, full = ([dict(row) for row in rows([0.7, 0.9])] for _ in range(2))
    for row in (*ste, *full):
        del row["window"]
    for row in full:
        del row["cfs_relative"]
    runs = {"ste": ste, "full_precision": full, "cbp": rows([0.8, 0.9])}
    figures.plot_training(tmp_path / "f" / "t.png", "title", runs, 0.95)
    top, bottom, _ = drawn[0].axes
    assert len(lines_with(top, [1, 2])) == 3
    visible = [line for line in lines_with(bottom, [1, 2]) if np.isfinite(line.get_ydata()).all()]
    assert len(visible) == 2


def test_histograms_share_one_scale(drawn, tmp_path):
    rng = np.random.default_rng(0)
    snapshots = {
        "before": rng.normal(size=2000),
        "midway": rng.normal(size=2000) / 2,
        "after": np.repeat([-1.0, 1.0], 1000),
    }
    figures.plot_weights(tmp_path / "f" / "w.png", "title", snapshots, (-1, 1))
    panels = drawn[0].axes
    assert len({panel.get_ylim() for panel in panels}) == 1
    shares = [panel.patches[0].get_data().values for panel in panels]
    assert [np.sum(share) for share in shares] == pytest.approx([100] * 3)
    assert max(shares[2]) == pytest.approx(50)


def test_notes_weights_beyond_the_ends(drawn, tmp_path):
    before = np.linspace(-1, 1, 1000)
    after = np.where(np.arange(1000) < 20, 9.0, before)
    snapshots = {"before": before, "after": after}
    figures.plot_weights(tmp_path / "f" / "w.png", "title", snapshots, (-1, 1))
    notes = [[text.get_text() for text in panel.texts] for panel in drawn[0].axes]
    assert notes[0] == []
    assert len(notes[1]) == 1
    assert "2.0%" in notes[1][0]
