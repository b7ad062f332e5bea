"""How a comparison is shown: a page that stands alone, a picture, and a table for the terminal.

`page` and `examples` need Jinja, `draw` matplotlib, `table` rich; each is imported only where it is used. All three
show what `cai.report.figures` found and compute nothing but places on a scale.
"""

from cai.report.examples import examples
from cai.report.page import page
from cai.report.picture import draw
from cai.report.terminal_table import table

__all__ = ["draw", "examples", "page", "table"]
