"""Label maps over pictures, with lines between segments."""

import numpy as np
import torch

from opentrans_lab import overlays, scenes

NAMES = ("grass", "striped red star")


def test_ignored_pixels_keep_the_picture_and_segments_are_parted():
    image = torch.full((3, 6, 8), 0.25)
    labels = torch.zeros(6, 8, dtype=torch.int64)
    labels[:, 6:] = scenes.IGNORE
    segments = labels.clone()
    segments[:, 3:6] = 1  # two segments of one class
    plain = overlays.overlay(image, labels, NAMES)
    assert np.allclose(plain[:, 6:], 0.25) and np.allclose(plain[:, :6], plain[0, 0])
    parted = overlays.overlay(image, labels, NAMES, segments=segments)
    line = overlays.borders(segments.numpy())
    assert line.sum() == 12 and line[:, [2, 5]].all()
    assert (parted[line] == 1).all() and np.array_equal(parted[~line], plain[~line])


def test_a_figure_has_a_column_a_map_and_lines_where_asked():
    drawn = scenes.render(range(2), 32)
    maps, parts = list(drawn.labels), [torch.zeros_like(x) for x in drawn.labels]
    parts[0][:, 16:] = 1
    figure = overlays.compare(
        list(drawn.images), {"a": maps, "b": maps}, scenes.CLASSES, segments={"b": parts}
    )
    a, b = (axis.images[0].get_array() for axis in figure.axes[1:3])
    assert len(figure.axes) == 8 and (b[:, 15] == 1).all() and not np.array_equal(a, b)
    assert np.array_equal(a[:, :15], b[:, :15])
