"""Figures: the frontier against brute force; files that are whole, readable and repeatable."""

import base64
import itertools
import struct
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from cla_jax.reporting import Curve, Run
from cla_jax.reporting import figures as drawing
from cla_jax.reporting._style import Picture


def run(name: str, kv_bytes: int, shares: bool, perplexity: float, records: int = 60) -> Run:
    steps = np.arange(1, records + 1)
    loss = np.log(perplexity) + 3 * np.exp(-steps / 6)
    every = steps[9::10]
    return Run(
        name=name, directory=Path("runs", name), parameters=1, num_layers=6,
        kv_layers=3 if shares else 6, kv_heads=1, head_dim=32, kv_bytes_per_token=kv_bytes,
        steps=records, tokens=1000 * records, seconds=1.0,
        validation_loss=float(np.log(perplexity)), validation_perplexity=perplexity, seed=0,
        training=Curve(steps, 1000 * steps, loss),
        validation=Curve(every, 1000 * every, loss[every - 1] + 0.05),
    )  # fmt: skip


TWO = [run("tiny/MQA", 768, False, 6.30), run("tiny/MQA-CLA2", 384, True, 6.37)]
# As many as CLA Table 1 has, in pairs at the same cache size, some nearly on top of each other.
TWENTY = [
    run(f"1B/H{64 + i}-{'MQA-CLA2' if i % 2 else 'GQA4'}", 2560 << i // 4, bool(i % 2),
        14.4 - 0.06 * i + 0.04 * (i % 3))
    for i in range(20)
]  # fmt: skip


def names(svg: Path) -> list[str]:
    root = ElementTree.parse(svg).getroot()
    return [
        "".join(text.itertext()).strip() for text in root.iter("{http://www.w3.org/2000/svg}text")
    ]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6))))
def test_frontier_equals_brute_force(points: list[tuple[int, int]]):
    kept = [
        i
        for i, (x, y) in enumerate(points)
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
    ]
    frontier = drawing.pareto_frontier(points)
    assert sorted(frontier) == kept
    assert [points[i] for i in frontier] == sorted(points[i] for i in kept)


@pytest.mark.parametrize("draw", [drawing.loss_curves, drawing.pareto])
@pytest.mark.parametrize("runs", [TWO, TWENTY], ids=["two", "twenty"])
def test_both_files_name_every_model(tmp_path: Path, draw, runs: list[Run]):
    png, svg = drawing.save(draw(runs), tmp_path / "made" / "v1.0")
    assert (png.name, svg.name) == ("v1.0.png", "v1.0.svg")
    assert sorted(tmp_path.joinpath("made").iterdir()) == [png, svg]  # no partial file is left
    assert png.read_bytes()[16:24] == (1000).to_bytes(4) + (680).to_bytes(4)  # 5.0 x 3.4 inches
    shown = names(svg)
    for name in (run.name.partition("/")[2] for run in runs):
        assert any(text.split()[:1] == [name] for text in shown), f"{name} is not in the SVG"


@pytest.mark.parametrize("draw", [drawing.loss_curves, drawing.pareto])
def test_same_runs_same_bytes(tmp_path: Path, draw):
    first = drawing.save(draw(TWO), tmp_path / "first")
    figure = draw(TWO)
    for again in (
        drawing.save(figure, tmp_path / "again"),
        drawing.save(figure, tmp_path / "more"),
    ):
        assert [path.read_bytes() for path in again] == [path.read_bytes() for path in first]
    assert "matplotlib.pyplot" not in sys.modules


def test_twenty_labels_overlap_neither_each_other_nor_a_marker():
    figure = drawing.pareto(TWENTY)
    figure.set_dpi(200)  # as saved; at few pixels hinting makes letters wider
    figure.canvas.draw()
    axes = figure.axes[0]
    texts = [text for text in axes.texts if isinstance(text, Annotation) and text.get_text()]
    assert len(texts) == len(TWENTY)
    boxes = [text.get_window_extent() for text in texts]
    at = axes.transData.transform([(r.kv_bytes_per_token, r.validation_perplexity) for r in TWENTY])
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for box in boxes:
        assert not any(box.contains(*point) for point in at)
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1


def test_ticks_are_cache_sizes_that_occur():
    figure = drawing.pareto(TWO)
    figure.canvas.draw()
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["384 B", "768 B"]


def test_default_titles_state_the_numbers():
    def title(figure: Figure) -> str:
        return figure.texts[0].get_text()

    ratios = "MQA-CLA2: 0.50 × the cache of MQA at 1.011 × its perplexity"
    assert title(drawing.pareto(TWO)) == ratios
    assert title(drawing.pareto(TWO[::-1])) == ratios
    assert title(drawing.loss_curves(TWO)) == "Validation loss ends at 1.841 to 1.852"
    assert title(drawing.pareto(TWO, title="ours")) == "ours"


@pytest.mark.parametrize(
    ("count", "text"),
    [(1, "1 B"), (768, "768 B"), (2560, "2.5 KiB"), (3680, "3.59 KiB"), (163_840, "160 KiB"),
     (3 << 20, "3 MiB"), (1 << 41, "2048 GiB")],
)  # fmt: skip
def test_format_bytes(count: int, text: str):
    assert drawing.format_bytes(count) == text


def test_a_run_that_diverged_is_drawn_as_far_as_it_went():
    good, bad = TWO[0], run("tiny/MHA", 3072, False, float("nan"))
    bad.training.loss[:20], bad.validation.loss[:1] = good.training.loss[:20], 5.0
    figure = drawing.loss_curves([good, bad])
    figure.canvas.draw()
    assert "MHA  nan" in [text.get_text() for text in figure.axes[0].texts]


def test_refusals_name_the_run():
    empty = run("tiny/MHA", 3072, False, 6.0, records=0)
    nothing = run("tiny/MHA", 3072, False, float("nan"))
    with pytest.raises(ValueError, match="tiny/MHA: no training records"):
        drawing.loss_curves([*TWO, empty])
    with pytest.raises(ValueError, match=r"no finite losses to draw in runs/tiny/MHA"):
        drawing.loss_curves([nothing])
    with pytest.raises(ValueError, match="tiny/MHA: validation perplexity nan"):
        drawing.pareto([*TWO, nothing])
    for draw in (drawing.loss_curves, drawing.pareto):
        with pytest.raises(ValueError, match="no runs to draw"):
            draw([])


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    png, _ = drawing.save(drawing.loss_curves(TWO), tmp_path / "figure")
    before = png.read_bytes()

    def full(handle: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(drawing.os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        drawing.save(drawing.pareto(TWO), tmp_path / "figure")
    assert png.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_a_notebook_shows_what_save_writes(tmp_path):
    figure = drawing.pareto(TWO)
    assert isinstance(figure, Picture)
    data, metadata = figure._repr_mimebundle_()
    image = base64.b64decode(data["image/png"])
    assert image.startswith(b"\x89PNG")
    shown = metadata["image/png"]
    width, height = struct.unpack(">II", image[16:24])
    assert (width, height) == pytest.approx((2 * shown["width"], 2 * shown["height"]), abs=2)
    # The ticks, made when a figure is drawn, have the look of this family too.
    assert {label.get_fontsize() for label in figure.axes[0].get_xticklabels()} == {7.5}


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_suffix_is_the_format_written(tmp_path: Path, suffix: str):
    written = drawing.save(drawing.pareto(TWO), tmp_path / f"figure{suffix}")
    assert [*tmp_path.iterdir()] == [*written] == [tmp_path / f"figure{suffix}"]
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert written[0].read_bytes().startswith(start)


def test_refuses_a_suffix_that_is_no_format(tmp_path: Path):
    with pytest.raises(ValueError, match=r"\.jpg; expected \.png, \.svg or \.pdf"):
        drawing.save(drawing.pareto(TWO), tmp_path / "figure.jpg")
    assert not any(tmp_path.iterdir())
