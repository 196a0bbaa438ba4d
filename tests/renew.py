"""Make the last default run the committed one: `.venv/bin/python tests/renew.py` after Run.

Copies gan.nbconvert.ipynb to gan.ipynb, the generator for the page to its default, and renews the
pictures that README shows: that of the page in Chromium, where there is one.
"""

import base64
import io
import shutil

import nbformat
import numpy as np
from conftest import BROWSER, ROOT, browse
from PIL import Image

PICTURES = ROOT / "gan_images"


def picture_of(notebook, name):
    """Return the first picture that the cell of this name shows, as the bytes of a PNG."""
    (cell,) = (cell for cell in notebook.cells if cell.id == name)
    data = [output.data["image/png"] for output in cell.outputs if "image/png" in output.data]
    return base64.b64decode(data[0])


def as_gif(png):
    """Return the bytes of a GIF with the frames of an animated PNG, in one palette."""
    film, frames, times = Image.open(io.BytesIO(png)), [], []
    for frame in range(1, film.n_frames):  # the first is what is seen where no film can be shown
        film.seek(frame)
        frames.append(film.convert("RGB"))
        times.append(film.info["duration"])
    palette = Image.fromarray(np.hstack(frames)).quantize(64)
    frames = [frame.quantize(palette=palette, dither=0) for frame in frames]
    options = {"save_all": True, "append_images": frames[1:], "duration": times, "loop": 0}
    frames[0].save(file := io.BytesIO(), "GIF", **options)
    return file.getvalue()


if __name__ == "__main__":
    notebook = nbformat.read(ROOT / "gan.nbconvert.ipynb", as_version=4)
    (PICTURES / "default_plane.gif").write_bytes(as_gif(picture_of(notebook, "small-game-run")))
    (PICTURES / "default_uses.png").write_bytes(picture_of(notebook, "fill-run"))
    shutil.copy(PICTURES / "progress.gif", PICTURES / "default_run.gif")
    shutil.copy(PICTURES / "generator.js", PICTURES / "default_generator.js")
    if BROWSER:
        picture = f"--screenshot={PICTURES / 'default_page.png'}"
        browse(PICTURES / "play.html", "--hide-scrollbars", "--window-size=840,705", picture)
    shutil.move(ROOT / "gan.nbconvert.ipynb", ROOT / "gan.ipynb")
