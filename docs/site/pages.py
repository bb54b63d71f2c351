"""A hook of MkDocs: the pages that are not in docs/, and where links out of docs/ lead.

The home page is README; the API has a page for each room, of the names in `__all__`; files of the
repository that a page links to (figures, measurements, notebooks) are copied beside the pages.
"""

import ast
import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ROOMS = {
    "cla_jax": "cla_jax",
    "cla_jax.models": "cla_jax/models",
    "cla_jax.inference": "cla_jax/inference",
    "cla_jax.data": "cla_jax/data",
    "cla_jax.parallel": "cla_jax/parallel",
    "cla_jax.training": "cla_jax/training",
    "cla_jax.conversion": "cla_jax/conversion",
    "cla_jax.evaluation": "cla_jax/evaluation",
    "cla_jax.reporting": "cla_jax/reporting",
    "cla_kernels": "kernels/cla_kernels",
}
ORDER = ("architecture.md", "reuse.md", "experiments.md", "results.md", "paper-notes.md",
         "launching.md")  # fmt: skip
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)]*)?(\))")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages and files that docs/ does not hold, and sets the order."""
    config.nav = None
    files.append(
        File.generated(config, "index.md", content=(ROOT / "README.md").read_text("utf-8"))
    )
    for room, place in ROOMS.items():
        files.append(File.generated(config, f"api/{room}.md", content=_room(room, ROOT / place)))
    waiting = [*files.documentation_pages()]
    while waiting:
        source = waiting.pop()
        for target in _links(source):
            uri = _uri(target)
            if target.is_file() and uri not in files.src_uris:
                added = File.generated(config, uri, abs_src_path=str(target))
                files.append(added)
                waiting += [added] if added.is_documentation_page() else []
    pages = [name for name in ORDER if name in files.src_uris]
    others = sorted(
        file.src_uri
        for file in files.documentation_pages()
        if file.src_uri not in ("index.md", *ORDER) and not file.src_uri.startswith("api/")
    )
    api = [{room: f"api/{room}.md"} for room in ROOMS]
    config.nav = [{"cla-jax": "index.md"}, *pages, *others, {"API": api}]
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links, as they are right in the repository, made right on the site."""
    base = _base(page.file)

    def moved(match: re.Match[str]) -> str:
        opening, target, anchor, closing = match.groups()
        if "://" in target:
            return match[0]
        uri = _uri((base / target).resolve())
        relative = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
        return f"{opening}{relative}{anchor or ''}{closing}"

    return LINK.sub(moved, markdown)


def _base(file: File) -> Path:
    """The folder that a page's links start from, in the repository."""
    if file.src_uri == "index.md":
        return ROOT
    return Path(file.abs_src_path).parent if file.abs_src_path else DOCS / "api"


def _uri(target: Path) -> str:
    """A file of the repository, on the site."""
    if target == ROOT / "README.md":
        return "index.md"
    base = DOCS if target.is_relative_to(DOCS) else ROOT
    return Path(os.path.relpath(target, base)).as_posix()


def _links(file: File) -> list[Path]:
    base = _base(file)
    targets = (match[2] for match in LINK.finditer(file.content_string))
    return [(base / target).resolve() for target in targets if "://" not in target]


def _room(name: str, place: Path) -> str:
    """A page of a package's public names, then of those that only its modules have."""
    seen = _public(place / "__init__.py")
    # A function and its module may have one name, which then stands for the module.
    hidden = [one for one in seen if (place / f"{one}.py").exists()]
    blocks = [f"# {name}", _block(name, [one for one in seen if one not in hidden])]
    alone = "\n    options: {show_root_full_path: false}"
    blocks += [f"::: {name}.{one}.{one}{alone}" for one in hidden]
    for path in sorted(place.glob("[!_]*.py")):
        names = _public(path)
        if own := [one for one in names if one not in seen]:
            blocks.append(_block(f"{name}.{path.stem}", own))
    return "\n\n".join(blocks) + "\n"


def _block(name: str, members: list[str]) -> str:
    return f"::: {name}\n    options:\n      members: [{', '.join(members)}]"


def _public(path: Path) -> list[str]:
    """`__all__`, read without importing."""
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []
