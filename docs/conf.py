"""The documentation as a site, by Sphinx: `make docs`. Pages are Markdown for GitHub too; index.rst orders them."""

import sys
from pathlib import Path

from vila_ops import __version__

sys.path.insert(0, str(Path(__file__).parent))

project = "vila-ops"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "from_code"]
exclude_patterns = ["clients", "harnesses", "samples/*/**"]
myst_heading_anchors = 4
myst_disable_syntax = ["myst_line_comment", "myst_block_break", "myst_target", "myst_role"]  # GitHub has none of them
smartquotes = False
html_theme = "furo"
html_title = f"vila-ops {release}"
html_copy_source = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
