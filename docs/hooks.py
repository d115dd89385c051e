"""What mkdocs adds to the pages of this folder: files of the repository, generated references, ``llms.txt``.

Pages link to the repository as a code host shows it (``../benchmarks/results/methods.md``); those files become part of
the site. A line ``<!-- generated: NAME -->`` is replaced by what ``generated.NAME()`` returns. Every page is also
written as Markdown beside its HTML.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

import generated
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page

from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.record import RunRecord
from grass_ray.results.recorded import find_results
from grass_ray.results.rendering import render

ROOT = generated.ROOT
BROUGHT = ("*.md", "examples/*", "examples/recipes/**/*", "sweeps/*.py", "benchmarks/*.*", "benchmarks/verdict/*.*")
BROUGHT += ("benchmarks/results/**/*.md", "benchmarks/results/**/*.png", "benchmarks/results/**/*.html")
LINK = re.compile(r"(\]\()((?:\.\./)+)([^)#\s]*)")
# of Sphinx in docstrings: :class:`~grass_ray.optim.GaLore`
ROLE = re.compile(r":\w+:<code>~?(?:\w+\.)*(\w+)</code>")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Take files of the repository into the site; build the leaderboards' pages that it does not hold."""
    found = {path for pattern in BROUGHT for path in ROOT.glob(pattern) if path.is_file()}
    for path in sorted(found - {ROOT / "README.md"}):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for result in find_results(ROOT / "benchmarks" / "results"):
        page = result.folder / "leaderboard.html"
        if not page.exists():
            content = leaderboard_page(result.load())
            files.append(File.generated(config, page.relative_to(ROOT).as_posix(), content=content))


def leaderboard_page(records: list[RunRecord]) -> str:
    """The page that ``grass-ray leaderboard --format html`` writes of these records."""
    return render(build_leaderboard(records), "html", records=records)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what is generated, and let links that lead out of this folder stay on the site."""
    for name in re.findall(r"<!-- generated: (\w+) -->", markdown):
        markdown = markdown.replace(f"<!-- generated: {name} -->", getattr(generated, name)())
    depth = page.file.src_uri.count("/")

    def inside(link: re.Match[str]) -> str:
        leads_out = link[2].count("../") > depth
        return link[1] + (link[2][3:] if leads_out else link[2]) + link[3]

    return LINK.sub(inside, markdown) if page.file.generated_by is None else markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show Sphinx's roles in docstrings as plain code."""
    return ROLE.sub(r"<code>\1</code>", html)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Write the page's Markdown beside its HTML."""
    path = Path(config.site_dir, page.file.src_uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page.markdown or "", encoding="utf-8")
    return output


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> None:
    """Remember the order of the pages for ``llms.txt``."""
    config.extra["pages"] = nav.pages


def on_post_build(config: MkDocsConfig) -> None:
    """Write ``llms.txt``: what this is, and every page as Markdown with its first sentence."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", "", "## Pages", ""]
    for page in config.extra["pages"]:
        first = re.search(r"^# .*\n\n((?:\S.*\n)+)", page.markdown or "")
        sentence = re.split(r"(?<=\.)\s", " ".join(first[1].split()))[0] if first else ""
        lines.append(f"- [{page.title}]({posixpath.normpath(page.file.src_uri)}): {sentence}")
    Path(config.site_dir, "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
