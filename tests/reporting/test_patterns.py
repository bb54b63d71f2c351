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
    _, svg = save(figure, tmp_path / "patterns")
    text = " ".join(ElementTree.parse(svg).getroot().itertext())
    for expected in ("H128-MQA-CLA3", "DenseBack", "7 KV layers", "3,584 B/token"):
        assert expected in text


def test_no_models():
    with pytest.raises(ValueError, match="no models"):
        patterns([])
