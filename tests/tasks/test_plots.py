import numpy as np
import pytest

from seqssm.tasks.plots import MAX_CLASSES_WITH_COUNTS, confusion_figure, confusion_image, confusion_matrix_png, plain

COUNTS = np.array([[1200, 300], [0, 50]])


def test_cells_name_counts_and_shares():
    axes = confusion_figure(COUNTS, ["coding", "other"]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["1,200\n80%", "300\n20%", "0\n0%", "50\n100%"]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.8, 0.2], [0, 1]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["coding", "other"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["coding", "other"]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true", "predicted")
    assert axes.get_title() == "accuracy 0.806, 1,550 windows"


def test_text_contrasts_with_its_cell():
    axes = confusion_figure(COUNTS, ["coding", "other"]).axes[0]
    assert [text.get_color() for text in axes.texts] == ["white", "black", "black", "white"]


def test_many_classes_are_shaded_only():
    n = MAX_CLASSES_WITH_COUNTS + 1
    axes = confusion_figure(np.eye(n, dtype=int), [str(i) for i in range(n)]).axes[0]
    assert not axes.texts
    np.testing.assert_array_equal(axes.images[0].get_array(), np.eye(n))


def test_an_empty_class_is_drawn_empty():
    image = confusion_figure(np.zeros((2, 2), int), ["a", "b"]).axes[0].images[0]
    np.testing.assert_array_equal(image.get_array(), np.zeros((2, 2)))


def test_png_and_pixels_are_the_same_picture(tmp_path):
    import io

    from matplotlib.image import imread

    png = confusion_matrix_png(COUNTS, ["coding", "other"], tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").read_bytes() == png
    pixels = confusion_image(COUNTS, ["coding", "other"])
    assert pixels.dtype == np.uint8
    read = np.round(imread(io.BytesIO(png))[..., :3] * 255).astype(np.uint8)
    np.testing.assert_array_equal(read, pixels)
    assert (pixels.reshape(-1, 3) == [8, 48, 107]).all(1).sum() > 1000  # the darkest blue: a full row


def test_a_matrix_of_another_size_is_refused():
    with pytest.raises(ValueError, match="3 classes"):
        confusion_figure(COUNTS, ["a", "b", "c"])


def test_names_are_no_formulas() -> None:
    """Matplotlib takes what stands between two dollars for a formula, and fails where it is none."""
    names = ["US$ or CA$", r"$\frac{$", "caf\udce9"]
    figure = confusion_figure(np.eye(3, dtype=int), names, "from $ to ${")
    figure.canvas.draw()
    drawn = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert drawn == [r"US\$ or CA\$", r"\$\frac{\$", "caf?"]
    assert confusion_matrix_png(np.eye(3, dtype=int), names, title="from $ to ${").startswith(b"\x89PNG")
    assert plain("a long name", 6) == "a lon…"
