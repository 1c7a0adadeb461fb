"""Print a command block of the README: the fenced block behind the line `<!-- run: NAME -->`."""

import re
import sys
from pathlib import Path

text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
match = re.search(rf"<!-- run: {re.escape(sys.argv[1])} -->\n```\w*\n(.*?)```", text, re.DOTALL)
if match is None:
    sys.exit(f"the README has no block {sys.argv[1]!r}")
print(match[1])
