"""Progress line, table, plot, and the clock they show."""

import json
import time

import matplotlib
import pytest

from kfac.examples import reporting

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def histories():
    result = []
    for name, factor in (("kfac", 0.5), ("adam", 0.8)):
        history = reporting.History(name)
        for update in range(4):
            metrics = {"loss": factor**update, "error": 10 * factor**update}
            history.record(10 * update, 0.5 * update, metrics)
        result.append(history)
    return result


def test_a_history_keeps_measurements_in_order():
    history = reporting.History("kfac")
    history.record(0, 0.0, {"loss": 2})
    history.record(10, 1.5, {"loss": 1})
    assert history.updates == [0, 10]
    assert history.seconds == [0.0, 1.5]
    assert history.metrics == {"loss": [2.0, 1.0]}


def test_the_clock_stands_still_outside(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = reporting.TrainingClock()
    for training, evaluation in ((2.0, 50.0), (3.0, 70.0)):
        with clock:
            now[0] += training
            assert clock.seconds == pytest.approx(training if training == 2 else 5.0)
        now[0] += evaluation
    assert clock.seconds == pytest.approx(5.0)


def test_without_a_terminal_there_is_a_plain_line_now_and_then(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with reporting.Progress("kfac", total_steps=30, total_seconds=None) as progress:
        for step in range(1, 31):
            now[0] += 1.0
            progress.update(step, 0.1 * step, {"loss": 1.0 / step})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].split() == "kfac update 1 0.1 s loss 1".split()
    assert lines[-1].split() == "kfac update 21 2.1 s loss 0.04762".split()


def test_progress_is_that_of_the_nearer_limit():
    with reporting.Progress("kfac", total_steps=100, total_seconds=10.0) as progress:
        progress.update(5, 8.0, {})
        assert progress._bar.tasks[0].completed == pytest.approx(0.8)
        progress.update(90, 8.5, {})
        assert progress._bar.tasks[0].completed == pytest.approx(0.9)


def test_the_table_holds_all_cells_unabridged(capsys):
    columns = ["optimizer", *(f"a rather long column {i}" for i in range(6))]
    reporting.print_table("Title", columns, [["kfac", "7", *[1234.5678] * 5]])
    output = capsys.readouterr().out
    assert "Title" in output
    assert "…" not in output
    assert output.count("1,235") == 5
    assert output.count("rather") == 6


def test_numbers_are_aligned_at_the_right(capsys):
    reporting.print_table("", ["name", "value"], [["kfac", 1.0], ["adam", 2.25]])
    lines = capsys.readouterr().out.splitlines()
    ends = [line.index("│", 12) for line in lines if "kfac" in line or "adam" in line]
    one = next(line for line in lines if "kfac" in line)
    assert len(set(ends)) == 1
    assert one[ends[0] - 2] == "1"


def test_the_plot_is_a_png_in_a_folder_made_for_it(tmp_path, histories, capsys):
    target = tmp_path / "new" / "folder" / "curves.png"
    reporting.plot(histories, str(target), "Title", {"loss": "training loss"})
    assert target.read_bytes().startswith(PNG)
    assert str(target) in capsys.readouterr().out


def test_a_panel_a_metric_shows_every_run(tmp_path, histories, monkeypatch):
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    metrics = {"loss": "training loss", "error": "test error"}
    reporting.plot(histories, str(tmp_path / "x.png"), "Title", metrics)
    monkeypatch.undo()
    (figure,) = figures
    assert len(figure.axes) == 4
    for axis, (key, x_label) in zip(
        figure.axes,
        [(key, x) for key in metrics for x in ("updates", "training seconds")],
        strict=True,
    ):
        assert axis.get_xlabel() == x_label
        assert axis.get_yscale() == "log"
        for line, history in zip(axis.get_lines(), histories, strict=True):
            assert line.get_label() == history.name
            assert list(line.get_ydata()) == history.metrics[key]
    pyplot.close(figure)


def test_measurements_are_written_as_json(tmp_path, histories):
    path = tmp_path / "results" / "curves.json"
    reporting.write_json(histories, str(path))
    found = [reporting.History(**fields) for fields in json.loads(path.read_text())]
    assert found == histories


def test_a_figure_becomes_a_small_picture_with_its_colours(tmp_path):
    from matplotlib import pyplot
    from PIL import Image

    figure, axis = pyplot.subplots(figsize=(4, 3))
    axis.axhspan(0, 1, color="red")
    axis.set_axis_off()
    path = tmp_path / "new" / "figure.png"
    reporting.save_figure(figure, str(path), dpi=50)
    picture = Image.open(path)
    assert picture.size == (200, 150)
    assert picture.mode == "P"
    assert picture.convert("RGB").getpixel((100, 75)) == (255, 0, 0)
    assert not pyplot.fignum_exists(figure.number)
