"""The drawing of sharing maps."""

import xml.etree.ElementTree as ElementTree

import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from cla_jax.registry import model
from cla_jax.reporting.figures import save
from cla_jax.reporting.patterns import patterns


def test_owners_are_filled_and_readers_outlined(tmp_path):
    names = ["1B/H128-MQA", "1B/H128-MQA-CLA3", "1B/H128-MQA-CLA2-DenseBack"]
    figure = patterns([model(name) for name in names])
    cells = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    filled = [to_hex(cell.get_facecolor()) != "#ffffff" for cell in cells]
    assert (len(cells), sum(filled)) == (60, 20 + 7 + 11)
    (svg,) = save(figure, tmp_path / "patterns.svg")
    text = " ".join(ElementTree.parse(svg).getroot().itertext())
    for expected in ("H128-MQA-CLA3", "DenseBack", "7 KV layers", "3,584 B/token"):
        assert expected in text


@pytest.mark.parametrize("columns", [1, 2, 6])
def test_no_text_is_cut_off(columns):
    figure = patterns([model("1B/H128-MQA-CLA2-KeepEnds")] * columns)
    figure.canvas.draw()
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1, text.get_text()
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1, text.get_text()


def test_no_models():
    with pytest.raises(ValueError, match="no models"):
        patterns([])
