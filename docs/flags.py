"""Write the tables of flags in docs/reference.md from the scripts: python docs/flags.py"""

import ast
import functools
import re
from pathlib import Path

DOCS = Path(__file__).parent
TABLE = re.compile(r"(<!-- flags: (\S+) -->\n).*?(<!-- end of flags -->)", re.S)


@functools.cache
def flags_of(script: str) -> dict[str, str]:
    """A row for each field of Args: flag, default and meaning, as the script's comments say it."""
    text = (DOCS.parent / script).read_text()
    lines = text.splitlines()
    (args,) = [node for node in ast.parse(text).body if getattr(node, "name", "") == "Args"]
    rows = {}
    for field in args.body[1:]:
        name = "--" + field.target.id.replace("_", "-")
        default = ast.get_source_segment(text, field.value).replace('"', "")
        kind = ast.get_source_segment(text, field.annotation)
        if kind == "bool":
            flag = f"`{name}`, `--no-{name[2:]}`"
        elif kind.startswith("Literal"):
            choices = ", ".join(f"`{choice}`" for choice in re.findall('"(.*?)"', kind))
            flag = f"`{name}`: {choices}"
        else:
            flag = f"`{name}`"
        _, _, comment = lines[field.end_lineno - 1].partition("  # ")
        above = lines[field.lineno - 2].strip()
        group = f"| *{above[2:]}* | | |\n" if comment and above.startswith("# ") else ""
        meaning = comment or above[2:]
        rows[name] = f"{group}| {flag} | `{default}` | {meaning} |"
    return rows


def table_of(script: str) -> str:
    """All flags of sac_continuous.py; of a copy, those that it adds or changes."""
    rows = flags_of(script)
    if script != "sac_continuous.py":
        parent = flags_of("sac_continuous.py")
        rows = {name: row for name, row in rows.items() if parent.get(name) != row}
    return "\n".join(["| flag | default | meaning |", "|---|---|---|", *rows.values(), ""])


def filled(page: str) -> str:
    return TABLE.sub(lambda found: found[1] + table_of(found[2]) + found[3], page)


if __name__ == "__main__":
    reference = DOCS / "reference.md"
    reference.write_text(filled(reference.read_text()))
