"""The page of `gist-dist inspect`, and the same in numbers beside it."""

import json
from pathlib import Path
from typing import Any

from gist_dist.common.errors import UserError
from gist_dist.common.files import write_text
from gist_dist.report.page import ROLES, render
from gist_dist.report.plots import BLOCKS


def write_inspection(contents: dict[str, Any], page: Path) -> list[str]:
    """page: where the HTML goes; the JSON takes the same name. UserError for a place that can't be written to."""
    html = render("inspect.html.j2", [], **contents, blocks=BLOCKS, roles=ROLES)
    numbers = json.dumps(contents, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        for file, text in ((page, html), (page.with_suffix(".json"), numbers)):
            write_text(file, text)
    except OSError as error:
        raise UserError(f"--out {page}: can't be written: {error.strerror}") from None
    return [f"page     {page}", f"numbers  {page.with_suffix('.json')}"]
