"""Draw the pictures of the README from the embedded demo.

    pip install -e ".[export]" && python docs/make_images.py

Drawing PNGs needs a Chrome or Chromium that kaleido can find (set BROWSER_PATH if it does not).
"""

import tempfile
from pathlib import Path

from lens_unlearn.showcase import showcase

IMAGES = Path(__file__).parent / "images"
WANTED = {
    "Trade-off over the fraction of neurons": "tradeoff.png",
    "Specialization of neurons (selective-pruning)": "map.png",
}


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        report = showcase(Path(folder) / "demo")
    for title, name in WANTED.items():
        figure = report.figures[title]
        figure.update_layout(paper_bgcolor="white", plot_bgcolor="white", width=900, height=560)
        figure.write_image(IMAGES / name, scale=2)
        print(IMAGES / name)


if __name__ == "__main__":
    main()
