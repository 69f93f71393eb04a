"""mkdocs: a link of a page to a file outside docs/, such as ../tst_ext/nn.py, leads to a copy of it in the site."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"(?<=\]\()\.\./([^)#\s]+)")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of the pages in docs/ itself; those of its folders lead to other pages."""

    def copy(link: re.Match[str]) -> str:
        path = ROOT / link[1]
        if not path.is_file() or path.suffix == ".md":
            return link[0]  # mkdocs finds the link broken
        uri = f"files/{link[1]}"
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(path)))
        return uri

    return markdown if "/" in page.file.src_uri else OUTSIDE.sub(copy, markdown)
