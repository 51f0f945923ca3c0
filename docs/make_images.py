"""Draw the picture of the README from the embedded demo model.

    pip install -e ".[export]" && python docs/make_images.py

Drawing PNGs needs a Chrome or Chromium that kaleido can find (set BROWSER_PATH if it does not).
"""

from pathlib import Path

import lens_unlearn as lu

IMAGES = Path(__file__).parent / "images"


def main() -> None:
    model = lu.load_model("demo")
    code, prose = (lu.read_corpus(f"demo:{skill}", model, tokens=5000) for skill in ("python", "english"))
    forget, retain = (lu.collect(model, corpus, "mlp.post", progress=False) for corpus in (code, prose))
    score = forget.mean_abs / (retain.mean_abs + 1e-3)
    figure = lu.plot.specialization_map(forget, retain, selection=score.top(0.1))
    figure.update_layout(paper_bgcolor="white", plot_bgcolor="white", width=900, height=620)
    IMAGES.mkdir(exist_ok=True)
    figure.write_image(IMAGES / "map.png", scale=2)
    print(IMAGES / "map.png")


if __name__ == "__main__":
    main()
