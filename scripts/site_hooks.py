"""What mkdocs asks while it builds the site (mkdocs.yml): navigation, reference pages, links to files outside docs/."""

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "fat5": "models and `accelerate`",
    "fat5.ops": "tensor operations",
    "fat5.data": "text to batches",
    "fat5.model": "the model",
    "fat5.optim": "optimizers and schedules",
}
"""Whose public names have a reference page."""

REFERENCE = "Reference"


def on_config(config: Any) -> Any:
    """The navigation: sections and pages in the order of docs/README.md."""
    config.nav = [{"FAT5": "README.md"}, *navigation((ROOT / "docs/README.md").read_text(encoding="utf-8"))]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the reference pages."""
    from mkdocs.structure.files import File

    for room in ROOMS:
        files.append(File.generated(config, page_of(room), content=reference(room)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns links that leave docs/ into links to the forge."""
    return turn_links(markdown, page.file.src_uri, config.repo_url)


def navigation(index: str) -> list[dict[str, list[str]]]:
    """Section → pages of an index in Markdown, each page once; the reference has the rooms' pages after its own."""
    sections: list[dict[str, list[str]]] = []
    seen: set[str] = set()
    for part in re.split(r"^## ", index, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        name = title.partition(":")[0].strip()
        pages = [page for page in re.findall(r"\]\(([\w/-]+\.md)(?:#[\w-]+)?\)", body) if page not in seen]
        pages = list(dict.fromkeys(pages))
        seen.update(pages)
        sections.append({name: pages + [page_of(room) for room in ROOMS if name == REFERENCE]})
    return sections


def page_of(room: str) -> str:
    """The reference page of a package."""
    return f"reference/{room}.md"


def reference(room: str) -> str:
    """A page of mkdocstrings with the public names of a package."""
    names = "\n\n".join(f"::: {room}.{name}" for name in public_names(room))
    return f"# {room}\n\nPublic names of `{room}`: {ROOMS[room]}.\n\n{names}\n"


def public_names(room: str) -> list[str]:
    """`__all__` of a package, else what it imports lazily (`fat5.lazy`); no constants in capitals, and no modules."""
    body = ast.parse((ROOT / "src" / room.replace(".", "/") / "__init__.py").read_bytes()).body
    names = {
        one.name
        for block in body
        if isinstance(block, ast.If)
        for line in block.body
        if isinstance(line, ast.ImportFrom) and line.module != room
        for one in line.names
    }
    for line in body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "__all__":
            names = set(ast.literal_eval(line.value))
    return sorted((name for name in names if not name.isupper()), key=lambda name: (name[0].islower(), name))


def turn_links(markdown: str, source: str, forge: str) -> str:
    """A page of docs/ whose links to files elsewhere in the repository lead to the forge."""

    def turn(found: re.Match[str]) -> str:
        target, _, anchor = found[1].partition("#")
        path = (ROOT / "docs" / source).parent.joinpath(target).resolve()
        if path.is_relative_to(ROOT / "docs"):
            return found[0]
        kind = "tree" if path.is_dir() else "blob"
        return f"]({forge}/{kind}/main/{path.relative_to(ROOT)}{'#' * bool(anchor)}{anchor})"

    return re.sub(r"\]\((\.\./[^)\s]+)\)", turn, markdown)
