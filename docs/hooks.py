"""What the site has beyond the pages of docs/: notebooks, gallery and changelog as pages, equations as MathML, links out of docs/.

The notebooks become pages here, from their stored outputs, so that the built site holds pictures and no script from elsewhere.
"""

import base64
import html
import json
import logging
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from latex2mathml.converter import convert

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/lens-unlearn/lens_unlearn"
LONGEST = 60
"""Lines of text output that a page shows of one cell."""

log = logging.getLogger("mkdocs.hooks.docs")

_LINK = re.compile(r"(?<!\\)\]\((?!https?:|mailto:|#)([^)\s]+?)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1`*[ \t]*$", re.MULTILINE | re.DOTALL)
_BADGE = re.compile(r"\[!\[([^\]]*)\]\(https?://[^)]*\)\]\((https?://[^)]*)\)")
_MATHS = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)


class Picture(NamedTuple):
    """A figure that a notebook's cell has drawn."""

    name: str
    title: str
    png: bytes


class Page(NamedTuple):
    """A notebook as a page: its pictures, and outputs in HTML that Markdown is not to touch, under their place's name."""

    title: str
    text: str
    pictures: list[Picture]
    raw: dict[str, str]


def notebooks() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


def joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def title_of(figure: dict[str, Any] | None, otherwise: str) -> str:
    """Return the first line of a figure's title, without tags."""
    title = ((figure or {}).get("layout") or {}).get("title") or {}
    text = title.get("text", "") if isinstance(title, dict) else title
    return html.unescape(re.sub(r"<[^>]+>", "", re.split(r"<br ?/?>", text or "")[0])).strip() or otherwise


def fenced(text: str, language: str) -> str:
    lines = text.rstrip("\n").splitlines()
    if len(lines) > LONGEST:
        lines = [*lines[:LONGEST], f"... ({len(lines) - LONGEST} more lines)"]
    marks = "`" * max(3, 1 + max((len(m) for m in re.findall(r"`+", text)), default=0))
    return f"{marks}{language}\n" + "\n".join(lines) + f"\n{marks}\n"


def page_of(path: Path) -> Page:
    """Turn a notebook into Markdown, with its stored outputs; pictures stand where interactive figures are in the notebook."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts, pictures, raw = [], [], {}
    for cell in cells:
        source = joined(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(_BADGE.sub(r"[\1](\2)", source))
            continue
        if cell["cell_type"] != "code" or not source.strip():
            continue
        parts.append(fenced(source, "python"))
        for output in cell.get("outputs", ()):
            parts.extend(_shown(output, path.stem, pictures, raw))
    text = "\n\n".join(parts)
    heading = re.search(r"^# (.+)$", text, re.MULTILINE)
    title = re.sub(r"[*`]", "", heading[1]).strip() if heading else path.stem
    notice = (
        f"*This page is [{path.name}]({REPOSITORY}/blob/main/notebooks/{path.name}) with the outputs stored in it. "
    )
    notice += "In the notebook the figures can be zoomed and hovered.*"
    text = text.replace(heading[0], f"{heading[0]}\n\n{notice}", 1) if heading else f"# {title}\n\n{notice}\n\n{text}"
    return Page(title, text, pictures, raw)


def _shown(output: dict[str, Any], stem: str, pictures: list[Picture], raw: dict[str, str]) -> Iterator[str]:
    """Show one output: a picture if there is one, else HTML without scripts, else text."""
    if output["output_type"] == "stream":
        if output.get("name") == "stdout":
            yield fenced(joined(output["text"]), "text")
        return
    data = output.get("data", {})
    if "image/png" in data:
        number = len(pictures) + 1
        title = title_of(data.get("application/vnd.plotly.v1+json"), f"Figure {number}")
        pictures.append(Picture(f"{stem}-{number}.png", title, base64.b64decode(joined(data["image/png"]))))
        escaped = title.replace("[", "(").replace("]", ")").replace('"', "'")
        yield f"![{escaped}]({pictures[-1].name}){{ #figure-{number} loading=lazy }}"
    elif "text/html" in data and "<script" not in joined(data["text/html"]):
        name = f"output-{stem}-{len(raw) + 1}"
        raw[name] = joined(data["text/html"])
        yield f'<div class="output" id="{name}"></div>'
    elif "text/plain" in data:
        yield fenced(joined(data["text/plain"]), "text")


def gallery(pages: dict[str, Page]) -> str:
    lines = [
        "# Gallery",
        "",
        "Every figure that the notebooks draw, on the demo model and, in the last, on SmolLM2. A picture leads to its place.",
        "",
    ]
    if not any(page.pictures for page in pages.values()):
        lines.append("No notebook has stored pictures yet.")
    for stem, page in pages.items():
        if page.pictures:
            lines += [f"## [{page.title}](notebooks/{stem}.md)", "", '<div class="gallery" markdown>', ""]
        for number, picture in enumerate(page.pictures, 1):
            title = picture.title.replace("[", "(").replace("]", ")").replace('"', "'")
            target = f"notebooks/{stem}.md#figure-{number}"
            lines += [f"[![{title}](notebooks/{picture.name}){{ loading=lazy }} {title}]({target})", ""]
        lines += ["</div>", ""] if page.pictures else []
    return "\n".join(lines) + "\n"


def leads_to(target: str, page: str) -> str:
    """Return where a link of a page leads on the site: what lies beside docs/ is a page there, or on GitHub."""
    folder = "" if page.startswith("notebooks/") else "docs"
    path = posixpath.normpath(posixpath.join(folder, posixpath.dirname(page), target))
    if path.startswith("docs/"):
        there = path.removeprefix("docs/")
    elif path == "CHANGELOG.md":
        there = "changelog.md"
    elif re.fullmatch(r"notebooks/[^/]+\.(ipynb|png)", path):
        there = path.replace(".ipynb", ".md")
    else:
        return f"{REPOSITORY}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"
    return posixpath.relpath(there, posixpath.dirname(page) or ".")


def outside_code(text: str, change: Any) -> str:
    """Change a text, but for its fenced code."""
    parts, at = [], 0
    for fence in _FENCE.finditer(text):
        parts += [change(text[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*parts, change(text[at:])])


def changelog() -> str:
    """Return CHANGELOG.md, whose links lead from the root, as a page of docs/."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return re.sub(r"\]\(docs/", "](", text)


def mathml(match: "re.Match[str]") -> str:
    display = "block" if match[1] == "div" else "inline"
    return convert(html.unescape(match[2]).strip(), display=display)


def requests(page: str) -> list[str]:
    """Return what a built page would fetch from elsewhere; links that a reader clicks are none of these."""
    addresses = []
    for tag in re.findall(r"<(?:script|img|link|iframe|source|video|audio|object|embed)\b[^>]*>", page):
        address = re.search(r"""(?:src|href|data)=["']?((?:https?:)?//[^"'\s>]+)""", tag)
        if address and "canonical" not in tag:
            addresses.append(address[1])
    return addresses


# What mkdocs calls, in this order.

_RAW: dict[str, str] = {}


def on_config(config: Any) -> Any:
    """Give every notebook its place in the navigation."""
    for entry in config.nav or ():
        if "Gallery" in entry:
            entry["Gallery"] += [{page_of(path).title: f"notebooks/{path.stem}.md"} for path in notebooks()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made from other files."""
    from mkdocs.structure.files import File

    pages = {path.stem: page_of(path) for path in notebooks()}
    made: dict[str, str | bytes] = {"changelog.md": changelog(), "gallery.md": gallery(pages)}
    for stem, page in pages.items():
        made[f"notebooks/{stem}.md"] = page.text
        made |= {f"notebooks/{picture.name}": picture.png for picture in page.pictures}
        _RAW.update(page.raw)
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links that leave docs/ to where their target is for a reader of the site."""
    source = page.file.src_uri
    return outside_code(markdown, lambda text: _LINK.sub(lambda m: f"]({leads_to(m[1], source)}{m[2] or ''})", text))


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Write equations as MathML, and put the notebooks' own HTML in its places."""
    html = _MATHS.sub(mathml, html)
    if page.file.src_uri.startswith("notebooks/"):
        for name, output in _RAW.items():
            html = html.replace(f'<div class="output" id="{name}"></div>', f'<div class="output">{output}</div>')
    return html


def on_post_build(config: Any) -> None:
    """Warn of what a page would fetch from elsewhere, which the strict build does not let pass."""
    for path in sorted(Path(config.site_dir).rglob("*.html")):
        for address in requests(path.read_text(encoding="utf-8")):
            log.warning("%s would fetch %s: the site needs no network", path.relative_to(config.site_dir), address)
