"""Reports as Markdown, and as an HTML page that needs no other file."""

import base64
import html
import re
from pathlib import Path

import markdown

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: auto; padding: 1rem; }}
:root {{ color-scheme: light dark; }}
h1 {{ font-size: 1.5rem; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; font-size: .9rem; }}
th, td {{ border: 1px solid #8888; padding: .2rem .5rem; text-align: left; white-space: nowrap; }}
td:first-child {{ white-space: normal; min-width: 8rem; }}
p:has(img) {{ overflow-x: auto; }}
img {{ width: 100%; min-width: 44rem; background: white; }}
pre {{ background: #8882; padding: .6rem; white-space: pre-wrap; font-size: .8rem; }}
</style></head><body>
{body}
</body></html>
"""


def tabulate(header: list[str], rows: list[list]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[str(cell).replace("|", "/") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def page(text: str, folder: Path) -> str:
    """The same as one HTML page that needs no other file."""
    body = markdown.markdown(text, extensions=["tables", "fenced_code"])

    def embed(found: re.Match) -> str:
        image = base64.b64encode((folder / found[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{image}"'

    body = re.sub(r'src="([\w.-]+\.png)"', embed, body)
    title = html.escape(text.split("\n")[0].lstrip("# "))
    return PAGE.format(title=title, body=body)
