"""What tests of pictures share."""

from itertools import combinations

import pytest


@pytest.fixture
def assert_readable(monkeypatch):
    """A check that every text of a figure lies inside of it and that no two overlap, on what is really drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    from unweave.synthetic.figures import style

    drawn, draw = [], Text.draw

    def record(text, renderer, *args, **kwargs):
        draw(text, renderer, *args, **kwargs)
        if text.get_visible() and text.get_text().strip():
            drawn.append(text)

    def check(figure):
        canvas = FigureCanvasAgg(figure)
        with style():
            canvas.draw()  # lays the figure out
            monkeypatch.setattr(Text, "draw", record)
            canvas.draw()
            monkeypatch.setattr(Text, "draw", draw)
        # Of a tick whose label is empty or lies outside of the axes nothing is drawn.
        boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in drawn]
        drawn.clear()
        page = figure.bbox
        assert boxes
        for text, box in boxes:
            inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= page.x1 + 1 and box.y1 <= page.y1 + 1
            assert inside, f"{text!r} is cut off: {box}"
        for (a, box), (b, other) in combinations(boxes, 2):
            assert not box.shrunk(0.9, 0.9).overlaps(other.shrunk(0.9, 0.9)), f"{a!r} stands on {b!r}"

    return check
